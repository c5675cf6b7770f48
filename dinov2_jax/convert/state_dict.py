"""Between our parameter trees and the reference's flat state dicts, exactly and strictly.

In: a nested dict of arrays, or a dict of names. Out: the other. Nothing is skipped: names without
a rule, parameters without a source, two names for one parameter and wrong shapes are all reported
in one error. The rules are a table, `dinov2_jax.convert.rules`; here is the engine. Numpy only.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from einops import EinopsError, rearrange

from dinov2_jax.convert import lazy
from dinov2_jax.convert.rules import MODULES, Rule

# The reference's training checkpoints say `blocks.{chunk}.{i}`, i counted over all chunks (its
# `block_chunks`); the released backbones say `blocks.{i}`.
CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")


class ConversionError(ValueError):
    """Parameters that do not fit; `problems` has one line for each reason."""

    def __init__(self, what: str, problems: list[str]):
        self.problems = problems
        super().__init__("\n  ".join([f"{what}: {len(problems)} problem(s)", *problems]))


def from_reference(
    flat: Mapping[str, lazy.Arrays],
    *,
    template: Mapping | None = None,
    problems: Iterable[str] = (),
) -> dict:
    """Makes our tree from a state dict of the reference.

    Args:
      flat: name -> array. Either the names of a bare backbone, or names with the prefixes of
        `MODULES` ("backbone.", "dino_head.", ..; any of them). Block names may be chunked.
      template: tree whose paths and shapes the result must have; its leaves need only a `shape`.
        Without it, each module found must be complete.
      problems: what the caller found already, for the same error.

    Returns:
      The nested parameters of a backbone, or of {"backbone": .., "dino_head": .., ..}; types and
      bits are kept.

    Raises:
      ConversionError: lists every name and shape that does not fit.
    """
    return load(lazy_from_reference(flat, template=template, problems=problems))


def load(tree):
    """Reads every leaf of a tree of lazy arrays."""
    if isinstance(tree, Mapping):
        return {name: load(branch) for name, branch in tree.items()}
    return np.asarray(tree)


def lazy_from_reference(
    flat: Mapping[str, lazy.Arrays],
    *,
    template: Mapping | None = None,
    problems: Iterable[str] = (),
) -> dict:
    """`from_reference` that checks everything and reads nothing: leaves are `LazyArray`s."""
    problems = [*problems, *([] if flat else ["it is empty"])]
    is_bare = is_bare_backbone(flat)
    modules = defaultdict(dict)
    for full_name, array in flat.items():
        module, _, name = ("backbone", "", full_name) if is_bare else full_name.partition(".")
        if module in MODULES:
            modules[module][name] = array
        else:
            problems.append(f"{full_name} has no rule")
    paths = {}
    for module, named in modules.items():
        prefix = "" if is_bare else f"{module}."
        found = module_from_reference(named, MODULES[module], prefix, problems)
        paths |= {prefix.replace(".", "/") + path: array for path, array in found.items()}
    if template is not None:
        problems += mismatches(paths, flatten(template), unless=_needed(modules, is_bare))
    if problems:
        raise ConversionError("cannot read this state dict", problems)
    return nest(paths)


def is_bare_backbone(flat: Iterable[str]) -> bool:
    """Whether names are those of a backbone alone, without prefixes."""
    return not any(name.startswith(tuple(f"{module}." for module in MODULES)) for name in flat)


def flatten_chunks(name: str) -> str:
    """A backbone's name, without prefix, with the chunk of its block left out."""
    return CHUNK.sub("blocks.", name)


def to_reference(params: Mapping) -> dict[str, np.ndarray]:
    """Makes the reference's state dict from our tree: the inverse of `from_reference`.

    Args:
      params: the nested parameters of a backbone, or {"backbone": .., "dino_head": ..,
        "ibot_head": ..} (any of them); leaves are arrays that numpy can read.

    Returns:
      name -> array, in the reference's order and not chunked; with prefixes unless `params` is a
      bare backbone. Arrays may be views of those given, and not contiguous.

    Raises:
      ConversionError: lists every path and shape that does not fit.
    """
    problems = [] if params else ["it is empty"]
    is_bare = not any(module in params for module in MODULES)
    flat = {}
    for module, tree in ({"backbone": params} if is_bare else params).items():
        if module not in MODULES:
            problems.append(f"{module} has no rule")
            continue
        paths = {path: np.asarray(leaf) for path, leaf in flatten(tree).items()}
        prefix = "" if is_bare else f"{module}/"
        named = module_to_reference(paths, MODULES[module], prefix, problems)
        flat |= {prefix.replace("/", ".") + name: array for name, array in named.items()}
    if problems:
        raise ConversionError("cannot name these parameters", problems)
    return flat


def module_from_reference(named, rules, prefix, problems) -> dict[str, np.ndarray]:
    """`{name: array}` of one module to `{path: array}`."""
    parts = defaultdict(dict)  # (rule, number) -> {block: (name, array)}
    for name, array in named.items():
        rule, block, number = _match(rules, "reference", flatten_chunks(name))
        if rule is None:
            problems.append(f"{prefix}{name} has no rule")
        elif block in parts[rule, number]:
            other, _ = parts[rule, number][block]
            problems.append(f"{prefix}{name} and {prefix}{other} are the same parameter")
        else:
            parts[rule, number][block] = name, array
    problems += _missing(rules, {rule for rule, _ in parts}, "reference", prefix)
    depth = 1 + max((block for found in parts.values() for block in found), default=0)
    paths = {}
    for (rule, number), found in parts.items():
        arrays, shapes = [], set()
        for block in range(depth if rule.is_stacked else 1):
            if block not in found:
                problems.append(f"{prefix}{rule.reference.format(i=block)} is missing")
                continue
            name, array = found[block]
            try:
                # A view of one number shows the shape, without the array being read.
                shapes.add(_move(np.broadcast_to(np.int8(0), array.shape), rule.layout).shape)
                arrays.append(array)
            except EinopsError:
                problems.append(f"{prefix}{name} has shape {array.shape}, not {rule.layout}")
        if len(shapes) > 1:
            problems.append(f"{prefix}{rule.reference} has several shapes: {sorted(shapes)}")
        elif arrays:
            paths[rule.ours.format(j=number)] = _lazy_leaf(arrays, rule)
    return paths


def _lazy_leaf(arrays: list[lazy.Arrays], rule: Rule) -> lazy.LazyArray:
    def transform(array):
        return _move(np.asarray(array), rule.layout)

    stacked = lazy.stack(arrays, transform)
    if rule.is_stacked:
        return stacked
    return lazy.LazyArray(stacked.shape[1:], stacked.dtype, lambda: transform(arrays[0]))


def module_to_reference(paths, rules, prefix, problems) -> dict[str, np.ndarray]:
    """`{path: array}` of one module to `{name: array}`, in the reference's order."""
    named, present, depths = [], set(), {}
    places = [place for place, rule in enumerate(rules) if "{" in rule.reference]
    first_numbered = min(places, default=len(rules))
    for path, array in paths.items():
        rule, _, number = _match(rules, "ours", path)
        if rule is None:
            problems.append(f"{prefix}{path} has no rule")
            continue
        present.add(rule)
        if rule.is_stacked:
            depths[f"{prefix}{path}"] = array.shape[:1]
        place = rules.index(rule)
        for block, part in enumerate(np.atleast_1d(array) if rule.is_stacked else [array]):
            name = rule.reference.format(i=block, j=number)
            try:
                part = _move(part, rule.layout, inverse=True)
            except EinopsError:
                problems.append(f"{prefix}{path} has shape {array.shape}, from {rule.layout}")
                break
            is_numbered = "{" in rule.reference
            order = (first_numbered, block + int(number or 0)) if is_numbered else (place, 0)
            named.append((*order, place, name, part))
    problems += _missing(rules, present, "ours", prefix)
    if len(set(depths.values())) > 1:
        problems.append(f"blocks are not stacked to one depth: {depths}")
    return {name: part for *_, name, part in sorted(named, key=lambda entry: entry[:3])}


def _match(rules: Iterable[Rule], side: str, name: str) -> tuple[Rule | None, int, str]:
    """The rule for a name ("reference") or path ("ours"); its block, or 0; its number, or ""."""
    for rule in rules:
        pattern = re.escape(getattr(rule, side))
        for letter in "ij":
            pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
        if match := re.fullmatch(pattern, name):
            numbers = match.groupdict()
            return rule, int(numbers.get("i", 0)), numbers.get("j", "")
    return None, 0, ""


def _missing(rules: Iterable[Rule], present: set[Rule], side: str, prefix: str) -> list[str]:
    """What a module lacks: parameters that all models have, or that its options ask for."""
    options = {rule.option for rule in present}
    problems = [
        f"{prefix}{getattr(rule, side)} is missing"
        for rule in rules
        if rule not in present and (not rule.option or rule.option in options)
    ]
    choices = {rule.option for rule in rules if "=" in rule.option}
    for choice in sorted({option.split("=")[0] for option in choices}):
        values = sorted(option for option in choices if option.startswith(f"{choice}="))
        found = sorted(options.intersection(values))
        if len(found) != 1:
            problems.append(f"{prefix}: exactly one of {values} must be there, not {found}")
    return problems


def _needed(modules: Iterable[str], is_bare: bool) -> set[str]:
    """Paths that every model has: where they are missing, `_missing` has said so."""
    return {
        ("" if is_bare else f"{module}/") + rule.ours
        for module in modules
        for rule in MODULES[module]
        if not rule.option
    }


def mismatches(paths: Mapping, template: Mapping, *, unless: set[str]) -> list[str]:
    problems = [f"{path} is not in the model" for path in paths if path not in template]
    for path, leaf in template.items():
        if path not in paths:
            problems += [] if path in unless else [f"{path} of the model has no source"]
        elif tuple(leaf.shape) != paths[path].shape:
            problems.append(f"{path} has shape {paths[path].shape}, the model {tuple(leaf.shape)}")
    return problems


def _move(array: np.ndarray, layout: str, *, inverse: bool = False) -> np.ndarray:
    if not layout:
        return array
    source, target = layout.split(" -> ")
    return rearrange(array, f"{target} -> {source}" if inverse else layout)


def flatten(tree: Mapping, path: str = "") -> dict:
    flat = {}
    for name, leaf in tree.items():
        is_branch = isinstance(leaf, Mapping)
        flat |= flatten(leaf, f"{path}{name}/") if is_branch else {path + name: leaf}
    return flat


def nest(paths: Mapping) -> dict:
    tree = {}
    for path, leaf in paths.items():
        *parents, name = path.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = leaf
    return tree
