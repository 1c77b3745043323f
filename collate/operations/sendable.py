"""What leaves a worker of a loader: refused by name where it cannot be pickled, since it would hang the loader."""

from torch.utils.data import get_worker_info

from collate.operations.serialization import try_to_send
from collate.padding.columns import titled
from collate.tensors.nested import FieldValues, assemble

# Types that can always be pickled, so that no trial is needed.
_PLAIN = (str, bytes, int, float, bool, type(None))


def check_can_travel(name: str, values: list[object]) -> None:
    """In a worker, refuse objects that cannot be pickled: they would hang the loader instead of failing.

    Raises:
        TypeError: There is one; the message names the first.
    """
    if get_worker_info() is None:
        return
    for index, value in enumerate(values):
        if isinstance(value, _PLAIN):
            continue
        try:
            try_to_send(value)
        except Exception as error:
            raise TypeError(
                f"{titled(name)}: the {type(value).__name__} in sample {index} cannot be sent from a worker "
                f"({error}): leave the field out of the samples, or make it picklable"
            ) from error


def check_structure_can_travel(sample: object, columns: FieldValues) -> None:
    """In a worker, refuse samples whose own type cannot be pickled.

    Raises:
        TypeError: It cannot.
    """
    if get_worker_info() is None:
        return
    try:
        try_to_send(assemble(sample, dict.fromkeys(columns)))
    except Exception as error:
        raise TypeError(
            f"a batch of the structure of its samples ({type(sample).__name__}) cannot be sent from a worker "
            f"({error}): define named tuples at the top level of a module, and use plain keys"
        ) from error
