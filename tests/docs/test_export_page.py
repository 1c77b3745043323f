"""The blocks of the page on exporting that are no doctests."""

import doctest
import re
import runpy
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
BLOCKS = dict(re.findall(r'```python title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
def test_a_recurrent_model_is_exported_as_the_page_does_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Strict export looks names up in the module that they are in, so it needs one.
    path = tmp_path / "export_recurrent.py"
    path.write_text(BLOCKS[path.name])
    runpy.run_path(str(path), run_name="export_recurrent")
    assert capsys.readouterr().out.split() == ["True", "True"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:# The axis name", "ignore:.*is deprecated")
def test_the_file_for_onnx_gives_what_the_model_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx, onnxscript and onnxruntime")
    pytest.importorskip("onnxscript", reason="needs onnx, onnxscript and onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in doctest.DocTestParser().get_examples(PAGE.split("## Recurrent")[0]):
        # Compiling is no part of it.
        if "compiled" not in example.source:
            exec(compile(example.source, "export.md", "single"), names)
    exec(compile(BLOCKS["to_onnx.py"], "export.md", "exec"), names)
    session = onnxruntime.InferenceSession("model.onnx")
    assert [given.name for given in session.get_inputs()] == ["padded", "lengths"]
    for batch in (names["batch_of"](5, 3, 2), names["batch_of"](9, 1), names["batch_of"](1, 0, 2, 4)):
        [result] = session.run(None, {"padded": batch.padded.numpy(), "lengths": batch.lengths.numpy()})
        assert abs(result - names["pooled"](batch).detach().numpy()).max() < 1e-5
