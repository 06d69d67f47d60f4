"""`rankwise lint`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rankwise.cli.common import (
    EXIT_CHECK_FAILED,
    EXIT_OK,
    OUTPUT,
    Output,
    argv,
    check_outputs,
    saved,
    write_outputs,
)

Listed = Annotated[tuple[str, ...], Parameter(negative="", show_default=False)]
"""Words with commas, or the flag again: a list that took all words behind it would take the sources, too."""


def lint(
    *sources: str,
    runtime: Annotated[Listed, Parameter(name="--for")] = (),
    model: str | None = None,
    ignore: Listed = (),
    strict: Annotated[bool, Parameter(negative="")] = False,
    device: str = "cpu",
    seed: int | None = None,  # noqa: ARG001 - every command takes it
    sarif: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Find mistakes in rank, alpha, rule and patterns, and what a serving runtime would do with them.

    Prints the scale that each module really gets, then the findings. The exit code is 3 where one is an error,
    so that it serves in CI and as a pre-commit hook.

    Args:
        sources: Adapters, adapter_config.json, YAML of axolotl, LLaMA-Factory or TRL, scripts, a command in quotes.
        runtime: Tell what it would do: vllm, sglang, llama.cpp, ollama, tensorrt-llm, comfyui, diffusers; or several.
        model: Folder of the base model, for the names of its modules; weights or their index, headers alone.
        ignore: Codes of findings to leave out, with commas.
        strict: Exit with 3 on warnings too.
        device: Always cpu, as nothing is computed.
        seed: Taken as every command takes it; nothing here is random.
        sarif: Also write the findings to this path as SARIF 2.1.0, as code hosts show them.
        output: Where the results go.
    """
    from rankwise.cli.show_lint import show_lint
    from rankwise.errors import DeviceError, UsageError
    from rankwise.files import check_writable, write_texts
    from rankwise.linting import lint as run
    from rankwise.linting.sarif import to_sarif

    if device != "cpu":
        raise DeviceError(f"lint computes on the cpu only, got --device {device}")
    check_outputs(output)
    if sarif is not None:
        if any(path is not None and path.resolve() == sarif.resolve() for path in (output.out, output.report)):
            raise UsageError(f"--sarif and another output both name {sarif}; give each its own path")
        check_writable(sarif, force=output.force)
    record = run(sources, runtime=runtime, model=model, ignore=ignore, command=argv())
    if sarif is not None:
        write_texts({sarif: to_sarif(record)}, force=output.force)
    write_outputs(record, output)
    if not output.json:
        show_lint(record)
    saved(output)
    if sarif is not None and not output.quiet:
        print(f"wrote {sarif}", file=sys.stderr)
    return EXIT_CHECK_FAILED if record.errors or (strict and record.warnings) else EXIT_OK
