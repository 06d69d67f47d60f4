"""Runs, measured adapters and demos with made-up numbers of the size that real ones have: what the page tests draw."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from page_samples import FIXED

from rankwise.records import (
    AttributeRecall,
    DemoRecord,
    DemoRun,
    Finding,
    Forgetting,
    GroupHealth,
    GroupScale,
    LossPoint,
    Recall,
    RecallRecord,
    RecallScore,
    RunConfig,
    RunRecord,
)

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hacked()>\"'`&amp;{{7*7}}"
ATTRIBUTES = {"birth date": 15.3, "birth city": 7.6, "university": 7.6, "major": 6.6, "employer": 9.5, "work city": 0.0}
GROUPS = tuple(f"{kind}/{third}" for kind in ("attention", "mlp") for third in ("early", "middle", "late"))
PEOPLE = 1000
BITS = sum(ATTRIBUTES.values())
RANKS = (1, 2, 4, 8, 16, 32, 64)

replace = msgspec.structs.replace


def _score(bits: float, exact: float, people: int = PEOPLE) -> RecallScore:
    return RecallScore(
        facts=people * 5,
        bits=bits * people,
        bits_possible=BITS * people,
        base_bits=-0.04 * people,
        exact_share=exact,
        base_exact_share=0.004,
    )


def recall(share: float = 0.84) -> Recall:
    """Return a recall of all that may be known, `share` of it recalled."""
    training = _score(share * BITS, share)
    return Recall(
        kind="pools",
        people=PEOPLE,
        asked_share=1.0,
        bits_per_param=training.bits / 600_000 if training.bits else None,
        paraphrases=_score(0.9 * share * BITS, 0.85 * share),
        held_out=_score(-0.2, 0.006, 100),
        by_attribute=tuple(
            AttributeRecall(
                attribute=name,
                facts=PEOPLE,
                bits_per_fact=share * bits * (0.8 + 0.05 * place) if bits else 5.1,
                bits_possible=bits,
                exact_share=min(1.0, share * (0.9 + 0.02 * place)),
            )
            for place, (name, bits) in enumerate(ATTRIBUTES.items())
        ),
        **{name: getattr(training, name) for name in RecallScore.__struct_fields__},
    )


def losses(n: int = 100, step: int = 5, diverges_at: int | None = None) -> tuple[LossPoint, ...]:
    """Return a loss that falls, under a linear schedule; past `diverges_at` it climbs and then is no number."""
    points = []
    for k in range(1, n + 1):
        loss: float | None = 0.12 + 3.4 * math.exp(-k / 14) + 0.03 * math.sin(k)
        if diverges_at is not None and k * step > diverges_at:
            over = k * step - diverges_at
            loss = 0.9 + 0.08 * over if over < 60 else None
        points.append(LossPoint(step=k * step, loss=loss, learning_rate=3e-3 * min(1, k / 5) * (1 - k / (n + 1))))
        if loss is None:
            break
    return tuple(points)


def health(steps: tuple[int, ...] = (10, 50, 100, 200, 300, 400, 500), starved: str = "") -> tuple[GroupHealth, ...]:
    """Return what a monitor would see; one group may be starved."""
    rows = []
    for step in steps:
        for place, group in enumerate(("all", *GROUPS)):
            poor = group == starved
            ratio = (0.004 if poor else 0.35 + 0.05 * place) * (1 - math.exp(-step / 120))
            rows.append(
                GroupHealth(
                    step=step,
                    group=group,
                    modules=14 if group == "all" else 4,
                    scaling=2.0,
                    branch_ratio=ratio,
                    relative_norm=0.4 * ratio,
                    update_norm=0.01,
                    update_ratio=1 / step,
                    effective_rank=(1.4 if poor else 30 + 3 * place) * (1 - math.exp(-step / 60)) + 1,
                    stable_rank=3.0,
                    grad_norm_A=0.01,
                    grad_norm_B=0.02,
                    status="starved" if poor and step >= 100 else "ok",
                )
            )
    return tuple(rows)


CONFIG = RunConfig(
    model="rankwise:tiny",
    data="rankwise:facts?n=1000&seed=1",
    data_digest="0123456789abcdef",
    preset=None,
    rank=64,
    lora_alpha=16.0,
    scaling="rslora",
    plan=None,
    target_modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    init="kaiming-uniform",
    lora_dropout=0.0,
    optimizer="adamw_torch",
    learning_rate=3e-3,
    schedule="linear",
    warmup_steps=25,
    weight_decay=0.0,
    max_grad_norm=1.0,
    steps=500,
    batch_size=64,
    gradient_accumulation=1,
    max_length=48,
    packing=False,
    bf16=False,
    gradient_checkpointing=False,
    groups=tuple(
        GroupScale(group=group, modules=4, r=64, lora_alpha=16.0, scaling=2.0, params=100_000) for group in GROUPS
    ),
)


def run(**more: Any) -> RunRecord:
    """Return a run that is done, everything measured; keywords replace fields."""
    fields: dict[str, Any] = {
        "format": RunRecord.FORMAT,
        "command": ("rankwise", "train", "rankwise:tiny", "rankwise:facts?n=1000&seed=1", "-o", "runs/a b"),
        "config": CONFIG,
        "status": "done",
        "params": 600_000,
        "steps": 500,
        "tokens": 480_000,
        "loss": 0.121,
        "recall": recall(),
        "forgetting": 0.132,
        "forgetting_detail": Forgetting(data="rankwise:plain", tokens=5120, base_loss=1.412, tuned_loss=1.544),
        "seconds": 214.0,
        "peak_memory_bytes": 812_000_000,
        "tokens_per_second": 2243.0,
        "losses": losses(),
        "health": health(),
        "findings": (Finding(code="high-forgetting", level="info", text="The loss on `plain` text rose."),),
        "error": None,
        **FIXED,
    }
    return RunRecord(**(fields | more))


def diverged(**more: Any) -> RunRecord:
    """Return a run whose loss left for good: what was measured is of an early adapter, and much is null."""
    fields: dict[str, Any] = {
        "status": "diverged",
        "steps": 200,
        "loss": None,
        "recall": replace(
            recall(0.1), bits=None, paraphrases=None, held_out=None, asked_share=1.0, bits_per_param=None
        ),
        "forgetting": None,
        "forgetting_detail": Forgetting(data="sampled from the base", tokens=512, base_loss=1.4, tuned_loss=None),
        "tokens_per_second": None,
        "peak_memory_bytes": None,
        "losses": losses(diverges_at=200),
        "health": health((10, 50, 100, 200), starved="mlp/late"),
        "error": "at step 265 the loss is nan; the adapter kept is that of step 200",
    }
    return run(**(fields | more))


def failed() -> RunRecord:
    """Return a run that failed before its first step: nothing was measured."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("tokens", "loss", "recall", "forgetting", "forgetting_detail", "seconds", "peak_memory_bytes")
    )
    empty: dict[str, Any] = dict.fromkeys(("losses", "health", "findings"), ())
    config = replace(CONFIG, groups=(), target_modules=(), max_grad_norm=0.0)
    return run(
        status="failed",
        steps=0,
        params=0,
        tokens_per_second=None,
        seed=None,
        error="out of memory: 8.1 GiB wanted",
        config=config,
        **nothing,
        **empty,
    )


def interrupted() -> RunRecord:
    """Return a run that was stopped, on data without pools."""
    told = RecallScore(facts=720, bits=None, bits_possible=None, base_bits=None, exact_share=0.0, base_exact_share=None)
    training = {name: getattr(told, name) for name in RecallScore.__struct_fields__} | {
        "bits": 4e4,
        "bits_possible": 5e4,
    }
    told_more = Recall(
        kind="loss",
        people=None,
        asked_share=1.0,
        bits_per_param=0.07,
        paraphrases=told,
        held_out=None,
        by_attribute=(),
        **training,
    )
    return run(
        status="interrupted", steps=40, recall=told_more, losses=losses(8), health=health((10,)), forgetting=-0.001
    )


def measured(**more: Any) -> RecallRecord:
    """Return what `recall` would write of an adapter."""
    fields: dict[str, Any] = {
        "format": RecallRecord.FORMAT,
        "command": ("rankwise", "recall", "rankwise:tiny", "runs/a b", "rankwise:facts?n=1000&seed=1"),
        "model": "rankwise:tiny",
        "adapter": "runs/a b",
        "data": "rankwise:facts?n=1000&seed=1",
        "params": 600_000,
        "recall": recall(),
        "forgetting": 0.132,
        "forgetting_detail": Forgetting(data="rankwise:plain", tokens=5120, base_loss=1.412, tuned_loss=1.544),
        "seconds": 12.3,
        **FIXED,
    }
    return RecallRecord(**(fields | more))


def measured_nothing() -> RecallRecord:
    """Return the record of a base alone of which little is known."""
    bare = replace(
        recall(0.0),
        kind="loss",
        people=None,
        facts=0,
        bits=None,
        bits_possible=None,
        base_bits=None,
        base_exact_share=None,
        asked_share=1.0,
        bits_per_param=None,
        paraphrases=None,
        held_out=None,
        by_attribute=(),
    )
    return measured(adapter=None, params=None, recall=bare, forgetting=None, forgetting_detail=None, seed=None)


def energy(rank: int, wide: float) -> dict[str, float | None]:
    """Return a share by rank that reaches 1 at `rank`."""
    ranks = [r for r in RANKS if r <= rank]
    return {str(r): 1.0 if r == rank else (1 - math.exp(-r / wide)) / (1 - math.exp(-rank / wide)) for r in ranks}


def demo_run(rank: int, rule: str, bits: float | None, **more: Any) -> DemoRun:
    """Return one run of the demo; `bits` of `BITS` decide the rest."""
    exact = None if bits is None else min(1.0, max(0.0, bits) / BITS * 1.18) ** 1.2
    style = more.get("role") == "style"
    fields: dict[str, Any] = {
        "name": f"{'style, ' if style else ''}rank {rank}, {rule}",
        "role": "fixed rate",
        "path": f"runs/rank-{rank}-{rule}.json",
        "rank": rank,
        "scaling": rule,
        "factor": 16 / rank if rule == "lora" else 16 / math.sqrt(rank),
        "learning_rate": 3e-3,
        "steps": 300,
        "params": 9_000 * rank,
        "status": "done",
        "loss": None if bits is None else 1.6 * (1 - bits / 50),
        "bits_per_person": bits,
        "exact_share": exact,
        "paraphrased_bits_per_person": None if bits is None else 0.9 * bits,
        "paraphrased_exact_share": None if exact is None else 0.82 * exact,
        "forgetting": None if bits is None else 0.02 + 0.004 * bits,
        "relative_norm": 0.2 if bits is None else 0.1 + bits / 100,
        "effective_rank": 0.6 * rank,
        "rank_90": 0.7 * rank,
        "energy_by_rank": energy(rank, 0.4 * rank),
        "seconds": 96.0,
    }
    return DemoRun(**(fields | more))


RUNS = (
    demo_run(8, "lora", 9.0),
    demo_run(64, "lora", 12.0, energy_by_rank=energy(64, 4.0), effective_rank=9.0),
    demo_run(8, "rslora", 17.0),
    demo_run(64, "rslora", 39.0),
    demo_run(64, "lora", 35.0, role="best rate", learning_rate=1e-2, name="rank 64, lora, best rate"),
    demo_run(8, "lora", 30.0, role="style", exact_share=0.97, energy_by_rank=energy(8, 2.0), forgetting=0.01),
)


def demo(**more: Any) -> DemoRecord:
    """Return a demo in which everything went well; keywords replace fields."""
    fields: dict[str, Any] = {
        "format": DemoRecord.FORMAT,
        "command": ("rankwise", "demo", "-o", "story and all"),
        "model": "rankwise:tiny",
        "model_params": 1_250_000,
        "data": "rankwise:facts?n=1000&seed=1",
        "style_data": "rankwise:style?n=120&seed=1",
        "people": PEOPLE,
        "facts": PEOPLE * 5,
        "bits_per_person": BITS,
        "base_bits_per_person": -0.04,
        "steps": 500,
        "batch_size": 64,
        "lora_alpha": 16.0,
        "learning_rate": 3e-3,
        "best_learning_rate": 1e-2,
        "best_chosen": "Among 1e-3, 3e-3 and 1e-2, by the bits recalled of 1,000 other people (`seed=9`), at rank 64.",
        "runs": RUNS,
        "caveats": (
            "One model of 1.2 M parameters, one seed: nothing here says that a model of another size behaves the same.",
            "At its best rate alpha / r is not far from alpha / √r: the step shrinks, not the room.",
        ),
        "reading": (
            "At the shared rate, rank 64 recalls 39.0 bits a person with alpha / √r and 12.0 with alpha / r.",
            "At a learning rate of 0.01, alpha / r recalls 35.0.",
        ),
        "seconds": 740.0,
        **FIXED,
    }
    return DemoRecord(**(fields | more))


def diverged_demo() -> DemoRecord:
    """Return a demo in which one run diverged with a figure, one without, and one is done with nothing known."""
    return demo(
        runs=(
            RUNS[0],
            RUNS[1],
            demo_run(8, "rslora", -4.1, status="diverged", forgetting=0.9),
            demo_run(64, "rslora", None, status="diverged", energy_by_rank={}, seconds=None, effective_rank=None),
            demo_run(16, "unscaled", None, energy_by_rank={"1": None, "16": 1.0}),
            RUNS[5],
        ),
        base_bits_per_person=None,
    )


def empty_demo() -> DemoRecord:
    """Return a demo that holds nothing."""
    return demo(
        runs=(), caveats=(), reading=(), best_chosen="", command=(), people=0, facts=0, bits_per_person=0.0, seed=None
    )


def hostile_run() -> RunRecord:
    """Return a run whose every word tries to leave the page."""
    rows = tuple(replace(row, group=HOSTILE, status=HOSTILE) for row in health())
    scored = replace(recall(), by_attribute=tuple(replace(a, attribute=HOSTILE) for a in recall().by_attribute))
    config = replace(
        CONFIG,
        model=HOSTILE,
        data=HOSTILE,
        plan=HOSTILE,
        preset=HOSTILE,
        scaling=HOSTILE,
        optimizer=HOSTILE,
        init=HOSTILE,
        schedule=HOSTILE,
        target_modules=(HOSTILE,),
        groups=tuple(replace(g, group=HOSTILE) for g in CONFIG.groups),
    )
    return diverged(
        config=config,
        recall=scored,
        health=rows,
        error=HOSTILE,
        findings=(Finding(code=HOSTILE, level="error", text=HOSTILE),),
        forgetting_detail=Forgetting(data=HOSTILE, tokens=1, base_loss=1.0, tuned_loss=None),
        command=("rankwise", HOSTILE),
        device=HOSTILE,
    )


def hostile_demo() -> DemoRecord:
    """Return a demo whose every word tries to leave the page."""
    runs = [
        replace(r, name=HOSTILE, scaling=HOSTILE, path=HOSTILE, energy_by_rank={HOSTILE: 0.5, "2": 0.7}) for r in RUNS
    ]
    runs[1] = replace(runs[1], status="diverged")
    runs[2] = replace(runs[2], status="diverged", bits_per_person=None)
    words: dict[str, Any] = dict.fromkeys(("model", "data", "style_data", "best_chosen", "device"), HOSTILE)
    return demo(runs=tuple(runs), caveats=(HOSTILE,), reading=(HOSTILE,), command=("rankwise", HOSTILE), **words)


RECORDS: dict[str, Any] = {
    "run": run(),
    "diverged run": diverged(),
    "failed run": failed(),
    "interrupted run": interrupted(),
    "hostile run": hostile_run(),
    "recall": measured(),
    "recall of nothing": measured_nothing(),
    "hostile recall": measured(model=HOSTILE, adapter=HOSTILE, data=HOSTILE, recall=hostile_run().recall),
    "demo": demo(),
    "diverged demo": diverged_demo(),
    "empty demo": empty_demo(),
    "hostile demo": hostile_demo(),
}
