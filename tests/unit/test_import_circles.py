"""No module imports itself by way of others, function-level imports included."""

from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

from tests.unit.test_house_style import PACKAGES


def test_there_are_no_circles() -> None:
    """Imports for type checking do not count."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    imports = {
        module: graph.find_modules_directly_imported_by(module) & graph.modules
        for module in graph.modules
    }
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")
