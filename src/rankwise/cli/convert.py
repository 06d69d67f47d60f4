"""`rankwise convert`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from rankwise.cli.common import EXIT_OK, Output, Whole, argv, check_outputs, saved, write_outputs
from rankwise.errors import UsageError


def _addends(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    return tuple(token.value for token in tokens)


Addends = Annotated[
    tuple[str, ...], Parameter(name="--add", consume_multiple=True, converter=_addends, n_tokens=-1, negative="")
]


def convert(
    adapter: str,
    out: Path,
    /,
    *,
    rank: Whole | None = None,
    energy: float | None = None,
    relative_error: float | None = None,
    signal: Annotated[bool, Parameter(negative="")] = False,
    plan: Path | None = None,
    scaling: str | None = None,
    lora_alpha: float | None = None,
    alpha_equals_r: Annotated[bool, Parameter(negative="")] = False,
    bake: Annotated[bool, Parameter(negative="")] = False,
    runtime: Annotated[str | None, Parameter(name="--for")] = None,
    format: str | None = None,
    add: Addends = (),
    weight: float = 1.0,
    dtype: str | None = None,
    drop_others: Annotated[bool, Parameter(negative="")] = False,
    all_rows: Annotated[bool, Parameter(name="--all", negative="")] = False,
    device: str = "cpu",
    seed: int | None = None,  # noqa: ARG001 - every command takes it
    cluster: str | None = None,
    output: Output = Output(),  # noqa: B008 - frozen
) -> int:
    """Write an adapter in another rank, scaling rule, layout or file format: the same function, or its error stated.

    Without options the adapter is copied, cleaned of what no loader reads. A rank is cut by the SVD of
    scaling * B @ A, which is taken from the factors alone; the base model is not needed.

    Args:
        adapter: Adapter to convert: a folder, a file, a hub id (org/name[@revision]) or a URL.
        out: Where it goes: a folder, or a file that ends in .safetensors (kohya, diffusers).
        rank: Rank of every module; above the adapter's it is filled with zeros.
        energy: Keep this share of each module's energy (0.99 leaves a relative error of 0.1).
        relative_error: Leave at most this relative error in each module.
        signal: Not for adapters, which have no rounding noise to measure against: refused.
        plan: Ranks of a plan/1 record.
        scaling: Write alphas for this rule: lora (alpha / r) or rslora (alpha / sqrt(r)). The factors stay.
        lora_alpha: Write this alpha for all modules, and fold what is left of each scale into B.
        alpha_equals_r: Write lora_alpha = r, and fold each scale into B.
        bake: Fold the scales into B and fill all modules with zeros to one rank: right in every runtime.
        runtime: Do what this runtime needs: vllm, sglang, llama.cpp, ollama, tensorrt-llm, comfyui, diffusers.
        format: peft, kohya, diffusers or mlx. Default: that of the adapter, or of the runtime.
        add: Adapters to add, each as ADAPTER or ADAPTER=WEIGHT; then cut by the rank asked for.
        weight: Weight of the first adapter in the sum.
        dtype: Of the factors: float32, bfloat16, float16 or float64. Default: as they are stored.
        drop_others: Leave out what the target cannot hold (whole weights, embeddings) instead of refusing.
        all_rows: Print every module, however many there are.
        device: Always cpu, as factors are small.
        seed: Taken as every command takes it; nothing here is random.
        cluster: Address of a Ray cluster whose workers read and do the modules; the result is the same. local: start
            Ray on this machine.
        output: Where the record and the page go.
    """
    from rankwise.adapters.conversion import convert as run
    from rankwise.cli.show import Bar
    from rankwise.cli.show_conversion import show_conversion
    from rankwise.errors import DeviceError

    if device != "cpu":
        raise DeviceError(f"convert computes on the cpu only, got --device {device}")
    check_outputs(output)
    for path in (output.out, output.report):
        if path is not None and out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UsageError(f"{path} lies in OUT ({out}), which is written as a whole; give another path")
    with Bar(quiet=output.quiet) as bar:
        record = run(
            adapter,
            out,
            rank=rank,
            energy=energy,
            relative_error=relative_error,
            signal=signal,
            plan=plan,
            scaling=scaling,
            lora_alpha=lora_alpha,
            alpha_equals_r=alpha_equals_r,
            bake=bake,
            runtime=runtime,
            format=format,
            add=[_weighted(text) for text in add],
            weight=weight,
            dtype=dtype,
            drop_others=drop_others,
            cluster=cluster,
            force=output.force,
            command=argv(),
            progress=bar,
        )
    write_outputs(record, output)
    if not output.json:
        show_conversion(record, every=all_rows)
    saved(output)
    return EXIT_OK


def _weighted(text: str) -> tuple[str, float]:
    """Split ADAPTER=WEIGHT.

    Raises:
        UsageError: what stands after the last `=` is no number, and no such path is there.
    """
    source, sign, number = text.rpartition("=")
    if not sign or Path(text).exists():
        return text, 1.0
    try:
        return source, float(number)
    except ValueError:
        raise UsageError(f"--add {text}: wanted ADAPTER or ADAPTER=WEIGHT, such as style/=0.5") from None
