"""What a sweep file means: variants x seeds, each a whole `Config`, all of them checked before the first one runs.

A night of training that ends at the third of nine variants, because its name was mistyped, is a night lost.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from mlc.config import Config, flag
from mlc.flags import checked, read_yaml
from shards.console import UserError, did_you_mean

FOLDER = Path(__file__).parent
KEYS = ("base", "seeds", "metric", "baseline", "variants", "grid", "each")
OF_THE_SWEEP = ("seed", "output", "experiment", "resume", "resume_weights_only", "dry_run")  # it sets them itself
REFERENCE = re.compile(r"\{([A-Za-z][\w.,+=-]*)\}")  # the run of that variant with the same seed
NEVER = "1000000ep"  # but at the end
QUICK = {"max_steps": 4, "eval_every": NEVER, "checkpoint_every": NEVER, "log_interval": 1}


@dataclass(frozen=True)
class Variant:
    """`changes`: settings other than the base's; `needs`: names of the variants whose runs it reads; `point`: of
    `each:`, the one setting and its value."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    point: tuple[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """One training; `needs`: the runs that must be finished before."""

    variant: str
    seed: int
    config: Config
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.config.experiment

    @property
    def folder(self) -> Path:
        return Path(self.config.output) / self.name


@dataclass(frozen=True)
class Sweep:
    """`metrics`: the first is what the variants are compared by; `runs` are in an order in which they can run;
    `kind` is how the file gives the variants: variants, grid or each."""

    name: str
    kind: str
    out: Path
    metrics: list[str]
    baseline: str
    seeds: list[int]
    variants: list[Variant]
    runs: list[Run]


def read(
    source: str, *, given: dict[str, Any], seeds: list[int] | None = None, out: str = "", quick: bool = False
) -> Sweep:
    """A sweep file, or a packaged sweep by its name.

    given: settings that win over the file's `base` (`config`: recipes in place of the base's).
    quick: one seed, a few steps, in a folder of its own.

    Raises:
        UserError: in one line, naming the file and the variant.
    """
    path, loaded = _load(source)
    base = _named(path, loaded.get("base"), "base")
    recipes = given.get("config") or _listed(base.pop("config", []))
    _refuse_own(given, "")
    metrics = [str(name) for name in _listed(loaded.get("metric", []))]
    settings = _recipes(recipes) | ({"eval_metric": metrics[0]} if metrics else {}) | _checked(base, f"{path}: base")
    settings |= {name: value for name, value in given.items() if name != "config"}
    metrics = metrics or [settings.get("eval_metric", Config.eval_metric)]
    kind, variants = _variants(path, loaded, settings)
    order = _order(path, variants)
    baseline = str(loaded.get("baseline", variants[0].name))
    _known(baseline, variants, f"{path}: baseline")
    seeds = seeds or _seeds(path, loaded.get("seeds", [1, 2, 3]))
    folder = Path(out or f"runs/{path.stem}")
    if quick:
        folder, seeds = folder / "quick", seeds[:1]
    runs = [_run(path, settings, variant, seed, folder, quick) for seed in seeds for variant in order]
    return Sweep(path.stem, kind, folder, metrics, baseline, seeds, variants, runs)


def packaged() -> Iterator[tuple[str, str]]:
    """(name, first line) of each packaged sweep."""
    for path in sorted(FOLDER.glob("*.yaml")):
        yield path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


# ---- the file --------------------------------------------------------------------------------------------------------


def _load(source: str) -> tuple[Path, dict[str, Any]]:
    path = Path(source)
    if not path.is_file():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        names = [name for name, _ in packaged()]
        known = f"{did_you_mean(source, names)} (sweeps: {', '.join(names)})"
        raise UserError(f"{source}: neither a file nor a packaged sweep{known}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    loaded = _named(path, loaded, "the file")
    for key in loaded:
        if key not in KEYS:
            raise UserError(
                f"{path}: unknown key {key!r}{did_you_mean(str(key), KEYS)} (a sweep has {', '.join(KEYS)})"
            )
    return path, loaded


def _named(path: Path, value: Any, what: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {what}: expected `name: value` lines, found a {type(value).__name__}")
    return dict(value or {})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _recipes(names: list[Any]) -> dict[str, Any]:
    return {name: value for source in names for name, value in read_yaml(str(source)).items()}


def _checked(settings: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse_own({str(name).replace("-", "_"): value for name, value in settings.items()}, f"{where}: ")
    return checked(settings, where)


def _refuse_own(settings: dict[str, Any], where: str) -> None:
    for name in settings:
        if name in OF_THE_SWEEP:
            fix = {"seed": "; give `seeds:` or --seeds", "output": "; give --out", "dry_run": "; give --quick"}
            raise UserError(f"{where}{flag(name)} is set by the sweep itself{fix.get(name, '')}")


def _seeds(path: Path, value: Any) -> list[int]:
    seeds = _listed(value)
    if not seeds or len(set(map(str, seeds))) < len(seeds) or any(type(seed) is not int for seed in seeds):
        raise UserError(f"{path}: seeds: expected different whole numbers, as [1, 2, 3], not {value!r}")
    return seeds


# ---- variants --------------------------------------------------------------------------------------------------------


def _variants(path: Path, loaded: dict[str, Any], base: dict[str, Any]) -> tuple[str, list[Variant]]:
    kinds = [kind for kind in ("variants", "grid", "each") if kind in loaded]
    if len(kinds) != 1:
        raise UserError(f"{path}: give one of `variants:`, `grid:` and `each:`{f', not {kinds}' if kinds else ''}")
    kind = kinds[0]
    named = _named(path, loaded[kind], kind)
    if not named:
        raise UserError(f"{path}: {kind}: is empty")
    return kind, {"variants": _by_name, "grid": _grid, "each": _each}[kind](path, named, base)


def _by_name(path: Path, named: dict[str, Any], base: dict[str, Any]) -> list[Variant]:
    variants = []
    for name, changes in named.items():
        where = f"{path}: variant {name}"
        if not re.fullmatch(r"[A-Za-z0-9][\w.,+=-]*", str(name)):
            raise UserError(f"{where}: a name is made of letters, digits and . , + = _ -, since it names a folder")
        changes = _named(path, changes, f"variant {name}")
        recipes = _recipes(_listed(changes.pop("config", [])))
        changes = recipes | _checked(changes, where)
        needs = tuple(dict.fromkeys(_references(changes)))
        for other in needs:
            _known(other, [str(n) for n in named], f"{where}: {{{other}}}")
        variants.append(Variant(str(name), changes, needs))
    return variants


def _known(name: str, variants: list[Any], where: str) -> None:
    names = [getattr(variant, "name", variant) for variant in variants]
    if name not in names:
        raise UserError(f"{where}: there is no variant {name!r}{did_you_mean(name, names)} ({', '.join(names)})")


def _grid(path: Path, named: dict[str, Any], base: dict[str, Any]) -> list[Variant]:
    """The product, the last setting changing fastest."""
    values = [[_point(path, "grid", name, value) for value in _listed(values)] for name, values in named.items()]
    return _unique(path, [Variant(",".join(map(_text, each)), dict(each)) for each in itertools.product(*values)])


def _each(path: Path, named: dict[str, Any], base: dict[str, Any]) -> list[Variant]:
    """The base, then one setting at a time; a value that is the base's own is the base."""
    variants, plain = [Variant("base")], vars(_config(path, "base", base))
    for name, values in named.items():
        for value in _listed(values):
            point = _point(path, "each", name, value)
            if plain[point[0]] != point[1]:
                variants.append(Variant(_text(point), dict([point]), point=point))
    return _unique(path, variants)


def _point(path: Path, kind: str, name: str, value: Any) -> tuple[str, Any]:
    return next(iter(_checked({name: value}, f"{path}: {kind}").items()))


def _text(point: tuple[str, Any]) -> str:
    name, value = point
    shown = f"{value:g}" if isinstance(value, float) else re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")
    return f"{name}={shown}"


def _unique(path: Path, variants: list[Variant]) -> list[Variant]:
    names = [variant.name for variant in variants]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name} comes twice")
    return variants


# ---- runs ------------------------------------------------------------------------------------------------------------


def _order(path: Path, variants: list[Variant]) -> list[Variant]:
    """Those that read others' runs after them, else as in the file."""
    graph = TopologicalSorter({variant.name: variant.needs for variant in variants})
    try:
        graph.prepare()
    except CycleError as error:
        raise UserError(f"{path}: these variants wait for one another: {' -> '.join(error.args[1])}") from error
    ordered: list[Variant] = []
    while graph.is_active():
        ready = graph.get_ready()
        ordered += [variant for variant in variants if variant.name in ready]
        graph.done(*ready)
    return ordered


def _run(path: Path, base: dict[str, Any], variant: Variant, seed: int, out: Path, quick: bool) -> Run:
    settings = base | _resolved(variant.changes, out, seed) | (QUICK if quick else {})
    own = {"seed": seed, "output": str(out), "experiment": f"{variant.name}-s{seed}", "resume": "auto"}
    config = _config(path, f"variant {variant.name}", settings | own)
    return Run(variant.name, seed, config, tuple(f"{name}-s{seed}" for name in variant.needs))


def _config(path: Path, what: str, settings: dict[str, Any]) -> Config:
    try:
        return Config(**settings)
    except UserError as error:
        raise UserError(f"{path}: {what}: {error}") from error


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from REFERENCE.findall(value)
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _references(part)


def _resolved(value: Any, out: Path, seed: int) -> Any:
    """`{NAME}` -> the run folder of that variant."""
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: str(out / f"{found[1]}-s{seed}"), value)
    if isinstance(value, dict):
        return {key: _resolved(part, out, seed) for key, part in value.items()}
    return type(value)(_resolved(part, out, seed) for part in value) if isinstance(value, list | tuple) else value
