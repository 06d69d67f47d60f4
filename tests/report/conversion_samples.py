"""Conversions with made-up numbers: what the page tests draw."""

from __future__ import annotations

from page_samples import FIXED
from run_samples import HOSTILE

from rankwise.records import Addend, ConversionRecord, ConvertedModule, ServedScale, Setting, Skipped


def module(name: str, *, error: float = 0.0, best: float = 0.0, rank: int = 8) -> ConvertedModule:
    """Return one module, cut from 16 to `rank` and filled to 8 where it is lower."""
    return ConvertedModule(
        module=name,
        shape=(64, 48),
        kind="linear",
        before=Setting(r=16, lora_alpha=32.0, scaling=2.0, rule="lora"),
        after=Setting(r=8, lora_alpha=16.0, scaling=2.0, rule="lora"),
        rank=rank,
        dtype="BF16",
        norm=1.5,
        kept_energy_share=1 - best**2,
        error_before_cast=best,
        relative_error=error,
        exact=error == 0,
    )


def record(modules: tuple[ConvertedModule, ...], **more: object) -> ConversionRecord:
    """Return a conversion of these modules."""
    given = {
        **FIXED,
        "format": ConversionRecord.FORMAT,
        "command": ("rankwise", "convert", "adapter", "out"),
        "device": "cpu",
        "seed": None,
        "source": "adapter",
        "adapters": (Addend(source="adapter", weight=1.0),),
        "out": "out",
        "source_format": "peft",
        "out_format": "peft",
        "rule": "lora",
        "choice": "rank 8",
        "runtime": None,
        "baked": False,
        "exact": all(m.exact for m in modules),
        "relative_error": max((m.relative_error for m in modules), default=0.0),
        "params": 8 * 112 * len(modules),
        "modules": modules,
        "carried": (),
        "left_out": (),
        "runtimes": (ServedScale(runtime="vllm", right=True, lowest=1.0, highest=1.0, wrong=0),),
        "notes": (),
    }
    return ConversionRecord(**(given | more))  # type: ignore[arg-type]


CUT = tuple(module(f"model.layers.{i}.q_proj", error=0.1 + i / 500, best=0.1 + i / 501, rank=6) for i in range(60))

RECORDS: dict[str, ConversionRecord] = {
    "conversion": record(CUT),
    "exact conversion": record((module("a.b"), module("a.c")), choice=None),
    "rounded conversion": record((module("a.b"), module("a.c", error=2e-3)), choice=None, baked=True, runtimes=()),
    "hostile conversion": record(
        (module(HOSTILE, error=0.2, best=0.1),),
        source=HOSTILE,
        out=HOSTILE,
        adapters=(Addend(source=HOSTILE, weight=1.0), Addend(source="b", weight=-0.5)),
        notes=(HOSTILE,),
        carried=(HOSTILE,),
        left_out=(Skipped(module=HOSTILE, reason=HOSTILE),),
        runtimes=(ServedScale(runtime="llama.cpp", right=False, lowest=0.25, highest=2.0, wrong=1),),
    ),
}
