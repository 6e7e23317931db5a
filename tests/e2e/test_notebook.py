"""The notebook: it is stored without outputs, and runs from its own folder."""

import nbformat
import pytest
from ipykernel.kernelspec import install
from nbclient import NotebookClient

pytestmark = pytest.mark.e2e

KERNEL = "deepseek-vl2-test"


@pytest.fixture(scope="module")
def notebook(repository):
    return nbformat.read(repository / "examples" / "quickstart.ipynb", as_version=4)


def _outputs(notebook, kind: str) -> list:
    """What the cells gave of a MIME type, or on standard output for "text"."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    if kind == "text":
        return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    return [output.data[kind] for output in outputs if kind in output.get("data", ())]


def test_notebook_is_stored_clean(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


def test_notebook_runs(notebook, repository, tmp_path, monkeypatch):
    # A kernel of this very interpreter, whatever others the user has, and none of the user's start-up files.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    install(prefix=str(tmp_path), kernel_name=KERNEL)
    folder = str(repository / "examples")
    done = NotebookClient(notebook, timeout=240, kernel_name=KERNEL, resources={"metadata": {"path": folder}}).execute()
    errors = [
        output.text
        for cell in done.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stderr" and "Traceback" in output.text
    ]
    assert not errors
    assert len(_outputs(done, "image/png")) == 4  # the picture, and three with boxes
    text = "".join(_outputs(done, "text"))
    assert "<|det|>[[" in text
    assert "million parameters" in text
