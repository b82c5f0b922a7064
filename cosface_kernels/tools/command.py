"""Helpers that the commands of `cosface` share."""

import argparse
import difflib
import sys

# Modules of the extras, and what they are installed as.
MODULES = {name: name for name in ("tqdm", "safetensors")}
MODULES |= {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "matplotlib": "matplotlib"}
MODULES |= {"pytorch_metric_learning": "pytorch-metric-learning"}


class Parser(argparse.ArgumentParser):
    """A parser, of a command too, that says of a mistyped name which one may be meant."""

    def parse_known_args(self, words=None, namespace=None):
        self.words = sys.argv[1:] if words is None else words
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        places = [action.choices or () for action in self._actions if not action.option_strings]
        names = [*self._option_string_actions, *(name for choices in places for name in choices)]
        for word in (each.partition("=")[0] for each in self.words):
            near = difflib.get_close_matches(word, names, 1, 0.7)
            if near and near[0] != word and (word.startswith("-") or word in message):
                message += f"; did you mean {near[0]}?"
                break
        super().error(message)


def add(commands, run, name, **texts):
    """Add a command that run(arguments) does; the add_argument of its parser."""
    command = commands.add_parser(name, allow_abbrev=False, **texts)
    command.set_defaults(run=run, wrong_usage=command.error)
    return command.add_argument


def fail(message):
    """Say why it cannot be done; exit status 1."""
    print(f"cosface: {message}", file=sys.stderr)
    return 1


def without_extras(error, extras="train"):
    """Say which extra brings a missing module; exit status 1. Any other ModuleNotFoundError is raised again."""
    name = (error.name or "").partition(".")[0]
    if name not in MODULES:
        raise error
    return fail(f'this needs {MODULES[name]}, which is not installed: pip install "cosface-kernels[{extras}]"')


def refuse(arguments, *rules):
    """Report wrong usage with the message of the first rule, (whether it is wrong, message), that holds."""
    for is_wrong, message in rules:
        if is_wrong:
            arguments.wrong_usage(message)


def done(work, errors=(OSError, ValueError, RuntimeError, ArithmeticError), extras="train"):
    """Print what work() returns, if anything; 0, or 1 where one of the errors, or of the extras that is missing, says why not."""
    try:
        if (text := work()) is not None:
            print(text)
    except ModuleNotFoundError as error:
        return without_extras(error, extras)
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except errors as error:
        return fail(error)
    return 0
