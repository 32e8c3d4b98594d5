"""Parts that every process imports, and the help of commands, load no heavy library."""

import pytest

from tests.support.processes import python

MODELS = "torch cv2 av transformers timm onnxruntime"


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("from config.load import load_settings; load_settings()", f"{MODELS} numpy kombu pymongo"),
        # The King sizes its slots and reads fingerprints; av and cv2 come with the first file.
        ("import extractors.parts, extractors.media.decode", MODELS),
        ("import extractors.feature_file, extractors.suite", f"{MODELS} safetensors"),
        ("import fusion.bundle.differences, scripts.commands.bundle", f"{MODELS} pymongo"),
        ("import workers.pool.channel, workers.roles.loop", f"{MODELS} redis requests"),
        ("import insighttag", f"{MODELS} pydantic kombu pymongo typer"),
        ("import online_process; online_process.main(['--help'])", f"{MODELS} kombu pymongo"),
        ("import infer_net; infer_net.main(['--help'])", MODELS),
        ("import sys; from scripts.cli import run; sys.exit(run(['--help']))", f"{MODELS} kombu"),
        ("from corpus.extract.run import main; main('image', ['--help'])", f"{MODELS} ray"),
        ("from corpus.extract.out_of_fold import main; main(['--help'])", f"{MODELS} ray"),
    ],
)
def test_no_heavy_library_is_loaded(statement: str, heavy: str) -> None:
    code = f"import sys\ntry: {statement}\nexcept SystemExit as end: assert end.code == 0"
    done = python(
        "-c", f"{code}\nprint(sorted({set(heavy.split())} & set(sys.modules)))", check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
