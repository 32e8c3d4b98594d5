"""``insighttag export``: a bundle's model or a backbone for other runtimes, or as ``.pth``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.cli import option, say
from common.errors import BundleError, ConfigError, told
from scripts.commands.common import Config, Overrides, settings_of

if TYPE_CHECKING:
    from config.features import FeatureSettings
    from fusion.bundle.bundle import Bundle
    from fusion.bundle.export import Graph


Format = Literal["onnx", "torch", "state_dict", "pickle"]
Backbone = Literal["image", "video", "audio", "text", "video_lstm"]


def export(  # noqa: PLR0917  typer calls it by names
    out: Annotated[Path, option("The file to write.", "F")],
    form: Annotated[Format, option("What is written.", None, "--format")] = "onnx",
    bundle: Annotated[Path | None, option("The bundle; default: fusion.bundle.", "DIR")] = None,
    backbone: Annotated[
        Backbone | None, option("Export this extractor's model instead of the fusion model.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Write a model for other runtimes, and check the file against the model.

    state_dict and pickle are files that plain torch.load reads.
    """
    settings = settings_of(config, overrides)
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status(f"export {backbone or 'fusion'} as {form}"):
        from fusion.bundle.export import export as write

        if backbone is not None:
            graph = _backbone(backbone, settings.features, bundle)
        else:
            from fusion.bundle.export import fusion_graph

            graph = fusion_graph(_load(bundle or settings.fusion.bundle))
        written = write(graph, form, out)
    for case, difference in written.differences.items():
        say(f"{difference:9.2e}  {case}\n")
    say(f"largest difference {written.largest:.2e} on {len(written.differences)} inputs\n")
    say(f"{written.path} ({written.how}), facts in {written.sidecar}\n")


def _load(folder: Path) -> Bundle:
    from fusion.bundle.bundle import load_bundle

    with told("--bundle", BundleError):
        return load_bundle(folder)


def _backbone(name: Backbone, features: FeatureSettings, bundle: Path | None) -> Graph:
    """Return a backbone's graph; a bundle must have been trained with it."""
    from fusion.bundle.extractor_graphs import backbone_graph, fingerprints

    if bundle is not None:
        expected = _load(bundle).manifest.fingerprints
        for stream, digest in fingerprints(name, features).items():
            if stream in expected and expected[stream] != digest:
                raise ConfigError(
                    f"--bundle {bundle}: was trained with {stream} features {expected[stream]}, "
                    f"the config's extractor gives {digest}: name the config that it is served with"
                )
    return backbone_graph(name, features)
