"""Typed configs from YAML: composition by ``base``, dotted overrides, every mistake named in one sentence.

Numbers and booleans follow YAML 1.2 (``5e-4`` is a number, ``no`` is a string); duplicate keys and unknown
keys are errors, the latter with the nearest known name.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .errors import UserError

__all__ = ["FolderName", "StrictModel", "load_config", "read_yaml", "to_yaml"]

Json = dict[str, Any]


class StrictModel(BaseModel):
    """Base of every config class: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, use_attribute_docstrings=True
    )
    moved: ClassVar[Mapping[str, str]] = {}
    """Of a whole config: dotted keys of earlier versions, and where they stand now."""


def _as_path(value: Any) -> Any:
    """A number may be a folder's name (``out=$SLURM_JOB_ID``), and no shell expands ``out=~/runs``."""
    text = str(value) if type(value) is int else value
    return os.path.expanduser(text) if isinstance(text, str) else text


FolderName = Annotated[str, BeforeValidator(_as_path)]
"""A folder to write into; ``~`` is the home folder."""
Config = TypeVar("Config", bound=StrictModel)
MOST_LETTERS, MOST_VALUES = 1 << 20, 100_000
"""More than any config: what is larger was made to fill the memory."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's numbers and booleans, without dates, and strict about keys."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("int", r"^[-+]?(?:[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("merge", r"^<<$", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("^$"), [""])


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text.lstrip("+-").startswith(("0x", "0o")) else int(text)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Json:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = loader.construct_object(key, deep=True)
        if isinstance(name, list | dict):
            raise UserError(f"{key.start_mark.name}: a list or mapping stands where a key should")
        if name in seen:
            raise UserError(f"{key.start_mark.name}: key '{name}' stands twice; remove one")
        seen.add(name)
    loader.flatten_mapping(node)
    return {str(loader.construct_object(k)): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _parse(text: str, name: str) -> Any:
    if len(text) > MOST_LETTERS:
        raise UserError(f"{name} has {len(text)} letters, which no config needs (at most {MOST_LETTERS})")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    loader.name = name
    try:
        return _counted(loader.get_single_data(), name)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{name}: keys and lists stand too deep within one another") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{name} is not YAML: {error}") from error
    finally:
        loader.dispose()


def _counted(data: Any, name: str) -> Any:
    """``data``, if it is not too much once every alias is written out: a few lines of YAML can stand for
    terabytes, or for themselves."""
    left, count = [data], 0
    while left:
        value = left.pop()
        count += 1
        if count > MOST_VALUES:
            raise UserError(f"{name} stands for more than {MOST_VALUES} values; write it without aliases")
        if isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        elif isinstance(value, str) and "\0" in value:  # no path may have one
            raise UserError(f"{name}: {value[:80]!r} holds a NUL character; take it out")
    return data


def read_yaml(path: str | Path) -> Json:
    """The mapping in a YAML file, its ``base`` files merged underneath it; UserError if it has none."""
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> Json:
    if path.resolve() in above:
        raise UserError(f"{path}: base: the file includes itself; take it out of the list")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise UserError(f"{path}: {reason.lower()}; give the path of a YAML config") from error
    data = _parse(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UserError(
            f"{path} must hold keys and values, not {type(data).__name__}; see the files in configs/"
        )
    bases = data.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base: must be a list of YAML files, not {bases!r}")
    merged: Json = {}
    for name in names:
        merged = _merge(merged, _read(path.parent / name, (*above, path.resolve())))
    return _merge(merged, data)


def _merge(below: Json, above: Mapping[str, Any]) -> Json:
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _apply(data: Json, override: str) -> None:
    """Set one ``a.b.c=value``, the value read as YAML."""
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or not all(parts):
        raise UserError(f"override '{override}' must be written key=value, for instance optim.lr=1e-3")
    node = data
    for part in parts[:-1]:
        inner = node.get(part)
        if isinstance(inner, str):
            raise UserError(
                f"override '{override}': {part} is '{inner}' and has no keys; write {part} as a section, "
                f"{part}={{..}}"
            )
        if not isinstance(inner, dict):
            inner = {}
        node[part] = dict(inner)
        node = node[part]
    node[parts[-1]] = _parse(text, f"override '{override}'")


def load_config(cls: type[Config], path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A config of type ``cls`` from a YAML file (None: defaults) and ``key=value`` overrides.

    Raises UserError with every mistake, each with its key, its value and the nearest known key.
    """
    data = read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply(data, override)
    where = str(path) if path is not None else "settings"
    try:
        # through JSON, where strict mode takes lists for tuples
        return cls.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = "; ".join(_problems(cls, error))
        raise UserError(f"{where}: {problems}") from error


def _problems(cls: type[BaseModel], error: ValidationError) -> Iterator[str]:
    found = [
        ([str(part) for part in problem["loc"] if not _is_union_tag(part)], problem)
        for problem in error.errors()
    ]
    for parts, problem in found:
        if any(len(deeper) > len(parts) and deeper[: len(parts)] == parts for deeper, _ in found):
            continue  # of a key that takes several kinds of values: this kind was not meant
        key = ".".join(parts)
        if problem["type"] == "extra_forbidden" and (now := getattr(cls, "moved", {}).get(key)):
            yield f"{key}: stands under {now} now; write it there"
        elif problem["type"] == "extra_forbidden":
            known = _known_keys(cls, parts[:-1])
            near = get_close_matches(parts[-1], known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
            yield f"{key}: unknown key; {hint}"
        elif problem["type"] == "missing":
            yield f"{key}: missing; add it"
        elif problem["type"] == "value_error":
            text = problem["msg"].removeprefix("Value error, ")
            yield f"{key}: {text}" if key else text
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            value = json.dumps(problem["input"], default=str)
            near = get_close_matches(str(problem["input"]), _literals(problem), n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{key}: {message}, not {value[:80]}{hint}"


def _is_union_tag(part: int | str) -> bool:
    """Whether a part of an error's location is pydantic's name of a union member and no key."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "str", "bool", "none"))


def _literals(problem: Any) -> list[str]:
    return re.findall(r"'([^']*)'", str((problem.get("ctx") or {}).get("expected", "")))


def _known_keys(cls: type[BaseModel], parts: Sequence[str]) -> list[str]:
    """Field names of the model at a dotted place; those of ``cls`` where the place leads into a plain
    dict."""
    for part in parts:
        field = cls.model_fields.get(part)
        kinds = [field.annotation, *get_args(field.annotation)] if field is not None else []
        for inner in [a for kind in list(kinds) for a in get_args(kind)]:
            kinds.append(inner)
        models = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if models:
            cls = models[0]
    return list(cls.model_fields)


def to_yaml(config: BaseModel) -> str:
    """The config as YAML that ``load_config`` reads back to an equal one."""
    return _dump(json.loads(config.model_dump_json()))


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or our loader would take for something other than text."""


_Dumper.yaml_implicit_resolvers = {
    first: [*_Loader.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in {
        **{first: [] for first in _Loader.yaml_implicit_resolvers},
        **yaml.SafeDumper.yaml_implicit_resolvers,
    }.items()
}


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
