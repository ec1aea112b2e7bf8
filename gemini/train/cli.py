"""Entry of the command: options in, an exit code out, one readable line for what went wrong."""

import json
import os
import re
import sys
from collections.abc import Sequence

import torch

from gemini.errors import GeminiError
from gemini.initialize import launch_from_torch
from gemini.train.job import run
from gemini.train.options import Options, parse
from gemini.train.ranks import Ranks
from gemini.train.report import Report

INTERRUPTED = 130
EXPECTED = (GeminiError, torch.OutOfMemoryError, MemoryError, OSError, ValueError, NotImplementedError)
"""No bugs: too little memory, a disk that fails, a file that is no checkpoint, something not offered."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    options = parse(arguments)
    try:
        launch_from_torch({})
        is_first = Ranks.here().is_first
        with open(os.devnull, "w") as nowhere:
            output = sys.stderr if options.json else sys.stdout
            code, content = run(options, Report(output if is_first else nowhere))
    except KeyboardInterrupt:
        return _fail(options, INTERRUPTED, "interrupted before the last checkpoint was written")
    except Exception as error:
        if not _is_expected(error):
            raise
        # A ValueError says that what was asked for makes no sense; the rest, that it could not be done here.
        return _fail(options, 2 if isinstance(error, ValueError | NotImplementedError) else 1, _message(error))
    if options.json and is_first:
        print(json.dumps(content, indent=2))
    return code


def _is_expected(error: Exception) -> bool:
    """What is no bug: too little memory, a disk that fails, a file that is no checkpoint, something not offered."""
    if isinstance(
        error, GeminiError | torch.OutOfMemoryError | MemoryError | OSError | ValueError | NotImplementedError
    ):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's allocator for RAM


def _message(error: Exception) -> str:
    if isinstance(error, GeminiError | OSError | ValueError | NotImplementedError):
        # The library names its arguments; here they are options.
        named = str(error).replace("GeminiPlugin(offload_dir=...)", "--offload-dir").replace("argument ", "")
        return re.sub(r"\b(device|host|disk)_memory\b", r"--\1-memory", named)
    return f"out of memory: {error or 'the system gave none'}; lower --batch-size or --seq-len"


def _fail(options: Options, code: int, message: str) -> int:
    if options.json:
        print(json.dumps({"error": {"code": code, "message": message}}, indent=2))
    print(f"gemini.train: {message}", file=sys.stderr)
    return code
