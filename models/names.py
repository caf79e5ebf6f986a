"""How lists of models are written: `resnet34+se+norm=group` is the network of that name with the
flags `--se --norm group`."""

import inspect

from models.resnet import CHOICES, MODELS, build_model, check_model

Options = dict[str, bool | float | str]

# the modifications and what they are without being asked for
DEFAULTS: Options = {
    name: parameter.default
    for name, parameter in inspect.signature(build_model).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "backend"
}


def parse_model(text: str) -> tuple[str, Options]:
    """`resnet34+se+drop-path=0.1` -> ("resnet34", {"se": True, "drop_path": 0.1}), which
    `build_model` takes.

    Raises ValueError, in one sentence that names the part and those that are known.
    """
    if not text.isprintable():
        raise ValueError(f"{text!r} is no model: choose one of {', '.join(MODELS)}")
    name, *parts = text.split("+")
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r} in {text}: choose one of {', '.join(MODELS)}")
    options: Options = {}
    for part in parts:
        flag, given, value = part.partition("=")
        key = flag.replace("-", "_")
        if key not in DEFAULTS or "_" in flag:
            known = ", ".join(_written(*option) for option in DEFAULTS.items())
            raise ValueError(f"unknown part {part!r} of {text}: choose from {known}")
        if key in options:
            raise ValueError(f"{text} has {flag} twice: leave one out")
        options[key] = _value(key, value, bool(given), text)
    try:
        check_model(name, **options)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    return name, options


def model_label(name: str, options: Options) -> str:
    """What `parse_model` reads as the model `name` with these options of `build_model`; those that
    are as they are by default are left out."""
    parts = [name]
    for key, default in DEFAULTS.items():
        value, flag = options.get(key, default), key.replace("_", "-")
        if value != default:
            parts.append(flag if value is True else f"{flag}={value}")
    return "+".join(parts)


def _value(key: str, value: str, given: bool, text: str) -> bool | float | str:
    flag = key.replace("_", "-")
    if isinstance(DEFAULTS[key], bool):
        if given:
            raise ValueError(f"{flag} takes no value in {text}: write +{flag}")
        return True
    if not given:
        raise ValueError(f"{flag} needs a value in {text}: write +{_written(key, DEFAULTS[key])}")
    if isinstance(DEFAULTS[key], str):
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{flag}={value} in {text} must be a number") from None


def _written(key: str, default: bool | float | str) -> str:
    flag = key.replace("_", "-")
    if isinstance(default, bool):
        return flag
    return f"{flag}={'|'.join(CHOICES[key])}" if key in CHOICES else f"{flag}=NUMBER"
