"""The `chulengo` command: finds the verb, runs it, turns errors into one clear message.

Start-up is kept under 0.3 s: this module and every verb's `add_arguments` import nothing but the standard library, and
of the verbs only the one that was typed is imported at all.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence

import chulengo
from chulengo.errors import ChulengoError, nearest
from chulengo.model.allocator import let_segments_grow

VERBS = {
    "demo": "the whole loop on the embedded nano model, on a CPU, in minutes",
    "doctor": "what this machine can do, and what is missing",
    "inspect": "data as the model will see it: tokens, loss mask, ledger",
    "plan": "will it fit, and what takes the memory",
    "train": "QLoRA fine-tuning: live progress, plots, resumable",
    "search": "hyper-parameters and sample sizes, on short runs",
    "generate": "answers for a file of prompts, batched",
    "eval": "scores of a model, base against tuned, with intervals",
    "score": "scores of answers that exist already, no model needed",
    "compare": "two evaluations of the same items: is the difference real?",
    "simulate": "a client and an agent talk: transcripts and scores",
    "rate": "blind sheets for people to rate answers, and what they say",
    "bench": "speed and memory of a training step here, beside the limit",
    "report": "a run's report as one HTML file, and as a model card",
    "chat": "talk to base, adapter or both in the terminal",
}
EXIT_USER_ERROR = 2
# what the machine refuses, not what we did wrong; a missing file stays out: the verbs look for those themselves
REFUSALS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there, then type the same again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "name a place that you may read and write"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR), "name another file or folder"),
    errno.EMFILE: "ulimit -n 4096, then type the same again",
    errno.EIO: "look at that disk (dmesg), then type the same again",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit status: 0 done, 2 a mistake that the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    let_segments_grow()
    try:
        return _dispatch(words)
    except ChulengoError as error:
        return _last_words(f"chulengo: {error}", is_program=arguments is None)
    except KeyboardInterrupt:
        return _last_words("\nchulengo: interrupted", is_program=arguments is None)
    except BrokenPipeError:
        # the reader of our output went away (`| head`): nothing to tell, and Python must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        what = f"{error.filename}: {error.strerror}." if error.filename is not None else f"{error.strerror}."
        said = ChulengoError(what, next_step=REFUSALS[error.errno])
        return _last_words(f"chulengo: {said}", is_program=arguments is None)


def _last_words(text: str, *, is_program: bool) -> int:
    if is_program:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C pressed twice: no traceback out of Python's own exit
    sys.stdout.flush()
    print(text, file=sys.stderr)
    return EXIT_USER_ERROR


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"chulengo {chulengo.__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        raise ChulengoError(
            f"There is no command {verb!r}.",
            allowed=", ".join(VERBS),
            next_step=f"chulengo {near} --help" if near else "chulengo --help",
        )
    module = importlib.import_module(f"chulengo.cli.{verb}")
    parser = _Parser(prog=f"chulengo {verb}", description=module.__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(words[1:], argparse.Namespace(command=["chulengo", *words])))
    return status


class _Parser(argparse.ArgumentParser):
    """argparse whose errors read like ours and name the nearest option."""

    def error(self, message: str) -> None:  # type: ignore[override]  # argparse says NoReturn; raising is
        """Raises the problem as a `ChulengoError`."""
        hint = None
        if message.startswith("unrecognized arguments:"):
            unknown = message.split(":", 1)[1].split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            hint = nearest(unknown.split("=")[0], options)
        elif message.endswith("expected one argument"):  # a value that begins with - is taken for an option
            hint = self._example(message.removeprefix("argument ").split(":")[0])
        raise ChulengoError(
            f"{message[0].upper()}{message[1:]}.",
            next_step=f"{self.prog} … {hint}" if hint else f"{self.prog} --help",
        )

    def _example(self, option: str) -> str | None:
        """Returns an option, its value's name and what it is for, as they stand in the help."""
        for action in self._actions:
            if option == "/".join(action.option_strings):
                return f"{option} {action.metavar or ''}   ({action.help})"
        return None


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join([
        "usage: chulengo COMMAND [options]",
        "",
        "QLoRA fine-tuning of Llama 2 chat models, from raw conversations to a measured, served model.",
        "",
        *lines,
        "",
        "Start with `chulengo demo`. `chulengo COMMAND --help` explains one command.",
    ])
