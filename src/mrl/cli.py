"""The command line: one command = one public function, its flags derived from the function's signature."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from mrl import commands
from mrl.deploy.formats import PRECISIONS
from mrl.errors import MrlError
from mrl.launched import run_launched
from mrl.run import leads
from mrl.side_by_side import BACKENDS

COMMANDS: dict[str, Callable[..., Any]] = {
    "poc": commands.poc,
    "audit": commands.audit,
    "split": commands.split,
    "plan": commands.plan,
    "swap": commands.swap,
    "calibrate": commands.calibrate,
    "fit": commands.fit,
    "evaluate": commands.evaluate,
    "compare": commands.compare,
    "curve": commands.curve,
    "tune": commands.tune,
    "measure": commands.measure,
    "export": commands.export,
    "predict": commands.predict,
    "serve": commands.serve,
    "report": commands.report,
    "models": commands.models,
}
LISTS = {"measure": ("--image-size", "--batch", "--threads")}
WORDS = {"--backend": BACKENDS, "--precision": PRECISIONS}
POSITIONAL = {
    "predict": ("model", "images"),
    "models": ("pattern",),
    "serve": ("model",),
    "export": ("out",),
    "measure": ("models",),
    "tune": ("space",),
}
REST = ("predict", "measure", "tune")


def build_parser() -> ArgumentParser:
    """The parser of all commands.

    Example:
        >>> build_parser().prog
        'mrl'
    """
    parser = ArgumentParser(
        prog="mrl",
        description="Swap the attention of a trained vision model for MRL, and learn whether it is worth it.",
    )
    subcommands = parser.add_subcommands(title="commands", metavar="COMMAND")
    for name, function in COMMANDS.items():
        sub = ArgumentParser(description=(inspect.getdoc(function) or "").splitlines()[0])
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file with values for these flags")
        nested = {p.name: p.annotation for p in _parameters(function) if p.name in ("budget", "calibration")}
        sub.add_function_arguments(function, skip=set(nested), as_group=False)
        for field in nested:
            sub.add_class_arguments(commands.NESTED[field], None if field == "budget" else field)
        _dashes(sub)
        subcommands.add_subcommand(name, sub, help=(inspect.getdoc(function) or "").splitlines()[0])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; user errors are one sentence on standard error and status 1.

    Args:
        argv: the words after `mrl`; None reads them from the process.

    Returns:
        0 on success, 1 on a user's error, 130 when interrupted (argument errors exit with 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    parsed = parser.parse_args(_normalise(words))
    name = parsed["subcommand"]
    sys.path.insert(0, os.getcwd())  # so that --model package.module:factory finds the user's own code
    try:
        run_launched(name, COMMANDS[name], _arguments(COMMANDS[name], parsed[name]))
    except MrlError as error:
        if leads():
            print(f"mrl {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mrl {name}: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _arguments(function: Callable[..., Any], parsed: Namespace) -> dict[str, Any]:
    """The function's arguments, with the flat flags of its nested configurations put together again."""
    names = [p.name for p in _parameters(function)]
    values = {n: parsed[n] for n in names if n in parsed and n not in commands.NESTED}
    if "budget" in names:
        fields = commands.NESTED["budget"].__dataclass_fields__
        values["budget"] = commands.NESTED["budget"](**{f: parsed[f] for f in fields})
    if "calibration" in names:
        values["calibration"] = commands.NESTED["calibration"](**vars(parsed["calibration"]))
    return values


def _dashes(parser: ArgumentParser) -> None:
    """Flags are shown and read with dashes; underscores are still understood."""
    for action in parser._actions:
        for option in [o for o in action.option_strings if "_" in o]:
            dashed = option.replace("_", "-")
            parser._option_string_actions[dashed] = action
            action.option_strings = [dashed if o == option else o for o in action.option_strings]


def _normalise(words: list[str]) -> list[str]:
    """`--overwrite` alone means true, lists may be written `--layers 1 2 -1` or `--layers 1,2`, and `POSITIONAL` words need no flag."""
    function = COMMANDS.get(words[0])
    if function is None:
        return words
    switches = {"--" + p.name.replace("_", "-") for p in _parameters(function) if p.annotation in (bool, "bool")}
    switches |= {"--" + f.replace("_", "-") for f in _switch_fields(function)}
    bare = list(POSITIONAL.get(words[0], ()))
    many = bare[-1] if words[0] in REST else None  # takes all words that are left
    rest: list[str] = []
    out: list[str] = []
    i = 0
    while i < len(words):
        word = words[i]
        flag = word.replace("_", "-") if word.startswith("--") and "=" not in word else word
        following = words[i + 1].lower() if i + 1 < len(words) else ""
        if flag in switches and following not in ("true", "false"):
            out.append(f"{flag}=true")
        elif words[0] == "measure" and flag in WORDS:
            chosen = []
            while i + 1 < len(words) and (words[i + 1] in WORDS[flag] or not (chosen or words[i + 1].startswith("-"))):
                chosen.append(words[i + 1])
                i += 1
            out += [f"{flag}={json.dumps(chosen)}"] if chosen else [flag]
        elif flag in LISTS.get(words[0], ("--layers", "--image-size")):
            numbers = []
            while i + 1 < len(words) and all(_whole(part) for part in words[i + 1].split(",")):
                numbers += words[i + 1].split(",")
                i += 1
            single = words[0] not in LISTS and flag == "--image-size" and len(numbers) == 1
            out += [f"{flag}={numbers[0] if single else '[' + ','.join(numbers) + ']'}"] if numbers else [flag]
        elif word.startswith("--") and "=" not in word:
            out += words[i : i + 2]
            i += 1
        elif i and bare and (word == "-" or not word.startswith("-")):
            if bare[0] == many:
                rest.append(word)
            else:
                out.append(f"--{bare.pop(0)}={word}")
        else:
            out.append(word)
        i += 1
    return [*out, f"--{many}={json.dumps(rest)}"] if rest else out


def _switch_fields(function: Callable[..., Any]) -> list[str]:
    names = [p.name for p in _parameters(function)]
    if "budget" not in names:
        return []
    return [f.name for f in commands.NESTED["budget"].__dataclass_fields__.values() if f.type in (bool, "bool")]


def _whole(text: str) -> bool:
    return text.lstrip("-").isdigit()


if __name__ == "__main__":
    sys.exit(main())
