"""Which scalars are logged: few that everybody looks at, criteria and layers on request, all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lla_callbacks.objective.checks import shown as written

# Groups of tags that nobody opens a page for come last in every alphabet.
LAST = "zz_"
# With more layers than this none is logged unasked: their page would be the longest.
MOST_LAYERS = 20
WORDS = ("few", "criteria", "layers", "all")
ALLOWED = (
    '"few" (what everybody looks at), "criteria" (and every criterion), "layers" (and all that is '
    'known of each layer), "all", or a list of these words and of names such as "kh05"'
)


def last_group(name: str, kind: str) -> str:
    """Return a group of tags that comes last, such as ``zz_hessian_errors``."""
    return f"{LAST}{name}_{kind}"


def check_scalars(choice: object, names: Iterable[str]) -> tuple[str, ...]:
    """Return a choice of scalars as words and names.

    Args:
        choice: One of :data:`WORDS`, or several words and names.
        names: Single scalars that may be named, the last part of their tags.

    Raises:
        ValueError: If it is something else, naming what is allowed.
    """
    names = list(names)
    parts = (choice,) if isinstance(choice, str) else choice
    found = tuple(parts) if isinstance(parts, Collection) else ()
    if not found or not all(isinstance(p, str) and (p in WORDS or p in names) for p in found):
        raise ValueError(
            f"scalars is {written(choice)}; give {ALLOWED}. The names are: {', '.join(names)}."
        )
    return found


def shown(
    values: Mapping[str, float], choice: Collection[str], name: str, few: Collection[str]
) -> dict[str, float]:
    """Return the scalars that are logged.

    Args:
        values: Tag to value.
        choice: What :func:`check_scalars` returned.
        name: First part of the tags, the monitor's name.
        few: Last parts of the tags that ``"few"`` stands for.
    """
    if "all" in choice:
        return dict(values)
    layers = {tag.rsplit("/", 1)[0] for tag in values if tag.startswith(f"{name}_layers/")}
    single = {part for part in choice if part not in WORDS}
    every = bool({"few", "criteria", "layers"} & {*choice})

    def is_shown(tag: str) -> bool:
        group, _, rest = tag.partition("/")
        what = _what(rest)
        if what in single:
            return group != f"{name}_layers"
        if not every:
            return False
        if group == f"{name}_layers":
            unasked = what == "trace" and len(layers) <= MOST_LAYERS
            return "layers" in choice or unasked
        if what in few:
            return group != last_group(name, "cost")
        return "criteria" in choice and group in (
            f"{name}_criteria", last_group(name, "errors"), last_group(name, "bands"),
        )  # fmt: skip

    return {tag: value for tag, value in values.items() if is_shown(tag)}


def _what(rest: str) -> str:
    """Return the quantity that the rest of a tag names, ends of bands and loaders left out."""
    what = rest.split("/dataloader_idx_")[0].rsplit("/", 1)[-1]
    for end in ("_lower", "_upper", "_beyond"):
        what = what.removesuffix(end)
    return what


def logged(
    values: Mapping[str, float], choice: Collection[str], name: str, few: Collection[str]
) -> dict[str, float]:
    """Return those of a name that are logged: all of them, where nobody said which are few."""
    starts = tuple(f"{first}{name}{sign}" for first in ("", LAST) for sign in ("/", "_"))
    own = {tag: value for tag, value in values.items() if tag.startswith(starts)}
    return shown(own, choice, name, few) if few else own


def for_callbacks(values: Mapping[str, float]) -> dict[str, float]:
    """Return those that EarlyStopping and ModelCheckpoint may ask for: all but the last groups."""
    return {tag: value for tag, value in values.items() if not tag.startswith(LAST)}
