"""Options, recipe files, and what the help says about defaults."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import parse_size
from tailor_fast.cli.options import RecipeOptions
from tailor_fast.cli.plan import PlanOptions
from tailor_fast.cli.settings import recipe_of, run_options
from tailor_fast.patching.recipe import Recipe

FILE_ONLY = {"tol", "max_iterations"}


def options(**given: Any) -> PlanOptions:
    return PlanOptions(base=Path("a"), tuned=Path("b"), out=Path("c"), **given)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def help_of(name: str) -> Any:
    return get_type_hints(PlanOptions, include_extras=True)[name].__metadata__[0]


def test_nothing_given_is_the_default_recipe_with_nothing_set() -> None:
    recipe = recipe_of(options())
    assert recipe == Recipe()
    assert recipe.model_fields_set == set()  # what a user asked for is told apart from a default


def test_every_choice_of_a_recipe_is_an_option_with_the_same_default() -> None:
    names = {field.name for field in fields(RecipeOptions)} - {"recipe", "sparsity"}
    assert names == Recipe.model_fields.keys() - FILE_ONLY
    for name in names:
        default = Recipe.model_fields[name].default
        assert help_of(name).show_default == (True if default is None else str(default))


@pytest.mark.parametrize("name", [n for n in Recipe.model_fields if n not in FILE_ONLY])
def test_the_help_names_every_value_of_a_choice(name: str) -> None:
    annotation = Recipe.model_fields[name].annotation
    values = get_args(annotation) if get_origin(annotation) is Literal else ()
    words = re.findall(r"\w+", help_of(name).help)
    assert set(values) <= set(words)


def test_the_help_says_how_a_run_is_carried_out_by_default() -> None:
    run = RunOptions()
    for name in ("samples", "max_length", "batch_size", "tokens"):
        assert help_of(name).show_default == str(getattr(run, name))
    assert parse_size(help_of("out_shard_size").show_default) == run.max_shard_bytes
    assert help_of("max_ram").show_default == "no limit"
    assert run.max_ram is None


@pytest.mark.parametrize(
    ("sparsity", "density"), [(0.9, 0.1), (0.95, 0.05), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0)]
)
def test_sparsity_is_the_decimal_complement(sparsity: float, density: float) -> None:
    assert recipe_of(options(sparsity=sparsity)).density == density


def test_options_override_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "density: 0.2\nscope: row\ntol: 0.001\n")
    recipe = recipe_of(options(recipe=file, density=0.3, retain_weight=0.5))
    assert recipe == Recipe(density=0.3, scope="row", tol=0.001, retain_weight=0.5)
    assert recipe_of(options(recipe=file, sparsity=0.5)).density == 0.5
    assert recipe_of(options(recipe=written(tmp_path, "# nothing\n"))) == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("densty: 0.1", "unknown key 'densty'; the keys of a recipe are density, densities,"),
        ("sparsity: 0.9", "unknown key 'sparsity'"),
        ("density: 0.1\ndensity: 0.2", "a key occurs twice"),
        ("- density", "expected keys and values; got list"),
        ("density: [", "is not YAML: "),
        ("density: 1.5", "density: Input should be less than or equal to 1; got 1.5"),
        ("scope: all", "scope: Input should be 'tensor', 'block', 'row', 'layer' or 'global'"),
        ("targets: '('", "targets: not a regular expression: "),
        ("decorate: official\nscope: row", "decorate='official' is the authors' algorithm"),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        recipe_of(options(recipe=written(tmp_path, text)))
    assert message in str(error.value)
    if "official" not in text:
        assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}: ")


def test_a_missing_recipe_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read: No such file"):
        recipe_of(options(recipe=tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 0.1, "sparsity": 0.9}, "--density and --sparsity say the same"),
        ({"sparsity": 1.5}, r"--sparsity must be in \[0, 1\]; got 1.5"),
        ({"density": 1.5}, "--density: Input should be less than or equal to 1; got 1.5"),
        ({"salience_weight": -1.0}, "--salience-weight: Input should be greater than or equal"),
        ({"decorate": "foo"}, "--decorate: Input should be 'exact', 'obs', 'official' or 'none'"),
        ({"layers": "a-b"}, "--layers: not a list of block numbers"),
    ],
)
def test_a_bad_option_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(options(**given))


def test_run_options_are_the_librarys_unless_given() -> None:
    assert run_options(options(device="cpu")) == RunOptions()
    given = options(
        device="cpu",
        max_ram="2GiB",
        out_shard_size="3B",
        overwrite=True,
        batch_size=3,
        samples=5,
        max_length=7,
    )
    assert run_options(given) == RunOptions(
        device="cpu",
        max_ram=2 * 2**30,
        max_shard_bytes=3_000_000_000,
        overwrite=True,
        batch_size=3,
        samples=5,
        max_length=7,
    )


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "--device must be auto, cpu or cuda:N; got 'gpu'"),
        ("meta", "--device must be auto, cpu or cuda:N; got 'meta'"),
        ("cuda:99", "--device cuda:99 is not there; this machine has"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run_options(options(device=device))


def test_auto_is_a_device_that_is_there() -> None:
    assert run_options(options()).device in ("cpu", "cuda:0")


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="a size must be like 5GB"):
        run_options(options(device="cpu", max_ram="lots"))
