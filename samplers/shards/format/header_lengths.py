"""Lengths of members that are not arrays: from the headers of sound files, or declared in another member.

Sound files say how many frames they hold, and at which rate. `soundfile` reads this from a few hundred bytes:

>>> from samplers.shards.storage.reading import LocalFile
>>> from tempfile import TemporaryDirectory
>>> from pathlib import Path
>>> import soundfile
>>> with TemporaryDirectory() as folder:
...     path = str(Path(folder, "a.wav"))
...     soundfile.write(path, [0.0] * 1200, 8000)
...     file = LocalFile(path)
...     read_sound_header(file, Member("a.wav", b"", 0, file.size, file.read(0, 256)), "a.wav")
(1200, 8000)
"""

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from collate.errors import LengthError
from samplers.shards.format.samples import decode_member, field_of
from samplers.shards.format.tar import Member
from samplers.shards.storage.reading import RandomAccess
from samplers.sources.extras import load_extra

# Encodings of sound that soundfile reads.
SOUND: Final = frozenset(["wav", "flac", "ogg", "oga", "opus", "mp3"])
_SOUND_ID: Final = "sound headers"
_DECLARED_ID: Final = "declared in "
_GIVE: Final = (
    "give a length function (field, bytes) -> steps: length=, or --length MODULE:FUNCTION of a command; or a decoder, "
    "--decode FIELD=MODULE:FUNCTION"
)
# libsndfile's largest number stands for an unknown number of frames.
_UNKNOWN_FRAMES: Final = 1 << 62
# From about here on, the size of a wav's values says that it was unknown when the header was written.
_UNKNOWN_BYTES: Final = 0x7FFF_0000
# A wav of endless small chunks would be one read for each. Programs write a handful before the values.
_MOST_CHUNKS: Final = 1000
# The tag with the number of frames stands at most this many bytes behind the start of the first frame of an mp3.
_MP3_TAG: Final = 64


class HeaderLength(Protocol):
    """Measures fields that are not arrays without a function of the user's."""

    @property
    def id(self) -> str:
        """The name by which an index knows it."""
        ...

    def default_fields(self, suffixes: Mapping[str, Member], context: str) -> list[str]:
        """The fields that it measures in such a sample, if none are named."""
        ...

    def measure(self, file: RandomAccess, members: Mapping[str, Member], suffix: str, context: str) -> tuple[int, int]:
        """Steps of a member, and its steps in a second; 0 if that is unknown."""
        ...


@dataclass(frozen=True)
class SoundHeaders:
    """Frames of sound files, from their headers."""

    id: str = _SOUND_ID

    def default_fields(self, suffixes: Mapping[str, Member], context: str) -> list[str]:
        """The fields that are sound."""
        del context
        return [name for name, encoding in map(field_of, suffixes) if encoding.lower() in SOUND]

    def measure(self, file: RandomAccess, members: Mapping[str, Member], suffix: str, context: str) -> tuple[int, int]:
        """Frames of a sound file, and its rate in Hz.

        Raises:
            ModuleNotFoundError: soundfile is not installed.
            ValueError: The member is not sound, or its header does not say how many frames it holds.
        """
        if field_of(suffix)[1].lower() not in SOUND:
            raise ValueError(f"{context}: neither a .npy array nor sound: {_GIVE}")
        return read_sound_header(file, members[suffix], context)


@dataclass(frozen=True)
class DeclaredLength:
    """Lengths that another member declares, as `{"num_samples": 16000}` in a json.

    Attributes:
        path: The field that declares, and keys in it, separated by points: `json.num_samples`.
    """

    path: str

    @property
    def id(self) -> str:
        """The name by which an index knows it."""
        return _DECLARED_ID + self.path

    def default_fields(self, suffixes: Mapping[str, Member], context: str) -> list[str]:
        """The field that is sound; the declaring field itself if no field is.

        Raises:
            ValueError: Several fields are sound.
        """
        sounds = SoundHeaders().default_fields(suffixes, context)
        if len(sounds) > 1:
            raise ValueError(
                f"{context}: {self.path} may be the length of {' or '.join(sounds)}: name one (length_fields=, "
                "--fields)"
            )
        return sounds or [self._find(suffixes, context)[0]]

    def measure(self, file: RandomAccess, members: Mapping[str, Member], suffix: str, context: str) -> tuple[int, int]:
        """The number that is declared, or the length of a list there.

        Raises:
            LengthError: It is neither a non-negative integer nor a list.
            ValueError: There is no such field or key, or the member is damaged.
        """
        del suffix
        name, declaring = self._find(members, context)
        member = members[declaring]
        value = decode_member(field_of(declaring)[1], file.read(member.data, member.size), f"{context}, {declaring}")
        for key in self.path.removeprefix(name).split(".")[1:]:
            if not isinstance(value, dict) or key not in value:
                there = sorted(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
                raise ValueError(f"{context}: no {key!r} of {self.path} in {declaring}, there is {there}")
            value = value[key]
        if isinstance(value, list):
            return len(value), 0
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
            raise LengthError(f"{context}: {self.path} must be a non-negative integer or a list, got {value!r:.80}")
        return int(value), 0

    def _find(self, suffixes: Mapping[str, Member], context: str) -> tuple[str, str]:
        """The field that declares, and its suffix.

        Raises:
            ValueError: There is none.
        """
        names = {field_of(suffix)[0]: suffix for suffix in suffixes}
        fitting = [name for name in names if self.path == name or self.path.startswith(f"{name}.")]
        if not fitting:
            raise ValueError(f"{context}: no field has the length {self.path!r}, there are {sorted(names)}")
        # `meta.en.frames` may be `frames` of `meta.en.json`.
        name = max(fitting, key=len)
        return name, names[name]


def header_length_of(length_id: str | None) -> HeaderLength | None:
    """What measured the lengths of an index, from the name there. None for a function of a user's, or unknown."""
    if length_id == _SOUND_ID:
        return SoundHeaders()
    if length_id is not None and length_id.startswith(_DECLARED_ID):
        return DeclaredLength(length_id.removeprefix(_DECLARED_ID))
    return None


def read_sound_header(file: RandomAccess, member: Member, context: str) -> tuple[int, int]:
    """Frames of a sound file, and its rate in Hz.

    Args:
        file: The file that contains it.
        member: Its offset and size.
        context: Its origin, for messages.

    Raises:
        ModuleNotFoundError: soundfile is not installed.
        ValueError: It is not sound, it is cut off, or its header does not say how many frames it holds.
    """
    soundfile = load_extra("soundfile", "speech")
    stream = _MemberStream(file, member)

    def read() -> tuple[int, int, str]:
        with soundfile.SoundFile(stream) as sound:
            return int(sound.frames), int(sound.samplerate), str(sound.format)

    try:
        # Not on the main thread: an interrupt within a callback would be lost, and libsndfile would read nonsense.
        with ThreadPoolExecutor(1, "lengthtrack-sound") as thread:
            frames, rate, kind = thread.submit(read).result()
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise ValueError(
            f"{context}: soundfile cannot read this member: {reason}: restore it if it is damaged, or {_GIVE}"
        ) from None
    if (missing := _missing_bytes(stream, member.size, context)) > 0:
        raise ValueError(
            f"{context}: the file is cut off: its header says {missing:,} bytes more than there are: restore it, or "
            f"{_GIVE}"
        )
    # Without the tag, libsndfile guesses from the bit rate of the first frame.
    if frames >= _UNKNOWN_FRAMES or (kind == "MP3" and not _counts_frames(stream)):
        raise ValueError(f"{context}: the header of this {kind} does not say how many frames it holds: {_GIVE}")
    return frames, rate


def _missing_bytes(stream: "_MemberStream", size: int, context: str) -> int:
    """Bytes that a wav lacks of the values that its header announces. libsndfile counts those that are there.

    Raises:
        ValueError: It has more chunks before its values than any program writes.
    """
    stream.seek(0)
    head = stream.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return 0
    position = 12
    for _ in range(_MOST_CHUNKS):
        if len(chunk := stream.read(8)) < 8:
            return 0
        announced = int.from_bytes(chunk[4:], "little")
        position += 8
        if chunk[:4] == b"data":
            # A program that writes to a pipe does not know the size, and announces the largest one.
            return 0 if announced >= _UNKNOWN_BYTES else position + announced - size
        position += announced + announced % 2
        stream.seek(position)
    raise ValueError(f"{context}: more than {_MOST_CHUNKS:,} chunks stand before the values of this wav: {_GIVE}")


def _counts_frames(stream: "_MemberStream") -> bool:
    """Whether an mp3 begins with a tag that has the number of its frames."""
    stream.seek(0)
    start = stream.read(10)
    # An ID3 tag says its size in four times seven bits.
    skipped = 10 + sum(byte << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
    stream.seek(skipped if start[:3] == b"ID3" else 0)
    head = stream.read(_MP3_TAG)
    tag = max(head.find(b"Xing"), head.find(b"Info"))
    return tag >= 0 and len(head) > tag + 7 and bool(head[tag + 7] & 1)


class _MemberStream(io.RawIOBase):
    """A member of a shard as a file of its own; only what is asked for is read."""

    def __init__(self, file: RandomAccess, member: Member) -> None:
        super().__init__()
        self._file, self._member, self._position = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._member.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        member = self._member
        size = max(0, min(len(buffer), member.size - self._position))
        last = self._position + size
        # The first bytes were read together with the header of the tar.
        known = last <= len(member.head)
        first = member.data + self._position
        data = member.head[self._position : last] if known else self._file.read(first, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
