"""The lock file: what is asked of pip, and what is written of its answer."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.lock import ROOT, pins, render, requirements


def test_requirements_are_those_of_setup_cfg() -> None:
    """Dependencies and every extra; what stands in several has one specifier in all of them."""
    wanted = requirements(ROOT / "setup.cfg")
    names = {line.split(">")[0].split("=")[0] for line in wanted}
    assert {"torch", "kombu", "pytest", "ray[data]"} <= names
    assert len(names) == len(set(wanted))


def test_report_becomes_sorted_pins(tmp_path: Path) -> None:
    """Names are normalised, and neither hosts nor hashes are taken over."""
    entries = [
        {
            "metadata": {"name": name, "version": version},
            "download_info": {"url": "https://host.example/wheel.whl"},
        }
        for name, version in (("PyYAML", "6.0"), ("annotated_types", "0.7"), ("zope.x", "1"))
    ]
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"install": entries}))
    text = render("3.11", pins(report))
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["annotated-types==0.7", "pyyaml==6.0", "zope-x==1"]
    assert "host" not in text
