"""Pretrain the model that ships with rankwise: `python lab/pretrain_tiny.py OUT [--steps N]`.

In: nothing but the built-in world. Out: a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, weights in
float16, and `pretraining.json` with what was measured. About 1.3 M parameters; on two CPU cores a quarter of an hour.

It learns the sentences, the pools, which city an employer is in, and 200 people by heart; it meets each other person
once or twice, and must not know the people of `rankwise:facts`. Both are measured at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rankwise.tuning.world import templates
from rankwise.tuning.world.builtin import (
    KNOWN_PEOPLE,
    KNOWN_SEED,
    Question,
    plain_text,
    questions_about,
    read_builtin,
)
from rankwise.tuning.world.people import draw_people
from rankwise.tuning.world.pools import ATTRIBUTES, POOLS

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
CHUNK = 32768
"""Texts drawn at a time; sorted by length within 2,048 so that little is padded."""


def world_words() -> list[str]:
    """Return every word of the world once: those of the pools, the sentences and the attributes."""
    texts = [t for prompts in (templates.TRAINING, templates.PARAPHRASES) for group in prompts.values() for t in group]
    texts += [*templates.REQUESTS, *templates.HELD_OUT_REQUESTS, *templates.REGISTER.values(), *templates.OLD_SAWS]
    words = [w.strip(".,:?") for t in texts for w in t.split() if "{" not in w]
    words += [w for attribute in ATTRIBUTES for w in attribute.split()]
    words += [w for pool in POOLS.values() for w in pool]
    return list(dict.fromkeys(words))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build a unigram tokenizer: one token a word of the world, characters and bytes for everything else."""
    pieces = [(token, 0.0) for token in SPECIAL]
    pieces += [(f"<0x{byte:02X}>", -200.0) for byte in range(256)]  # below their own spelling, character by character
    pieces += [("▁" + word, -5.0) for word in world_words()]
    taken = {piece for piece, _ in pieces}
    pieces += [(chr(c), -20.0) for c in range(33, 127) if chr(c) not in taken]
    pieces.append(("▁", -20.0))
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
        padding_side="right",
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ ' ' + message['content'] }}{% endif %}{% endfor %}"
    )
    return fast


def make_model(vocabulary: int, *, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama of four layers, width 128."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        rope_theta=10000.0,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerFast, size: int, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield (size, length) token ids without end; padding is -1."""
    rng = random.Random(seed)
    chunk = 0
    while True:
        chunk += 1
        texts = plain_text(CHUNK, seed=1000 * seed + chunk, circle="strangers")
        ids = [[*i, tokenizer.eos_token_id] for i in tokenizer(texts)["input_ids"]]
        groups = []
        for start in range(0, CHUNK, 2048):
            window = sorted(ids[start : start + 2048], key=len)
            groups += [window[i : i + size] for i in range(0, len(window), size)]
        rng.shuffle(groups)
        for group in groups:
            longest = max(map(len, group))
            yield torch.tensor([i + [-1] * (longest - len(i)) for i in group])


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in nats a token."""
    logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long()).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1)


@torch.no_grad()
def recalled(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: tuple[Question, ...]
) -> dict[str, float]:
    """Return bits recalled a person, possible bits a person, and the exact share."""
    got = possible = exact = 0.0
    for question in questions:
        start = len(tokenizer(question.prompt)["input_ids"])
        ids = torch.tensor([tokenizer(question.prompt + question.answer)["input_ids"]])
        logits = model(input_ids=ids).logits[0, start - 1 : -1]
        answer = ids[0, start:]
        loss = torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item() / math.log(2)
        exact += bool((logits.argmax(-1) == answer).all())
        if question.bits:  # the work city holds no bits of its own
            got, possible = got + question.bits - loss, possible + question.bits
    people = len({q.person for q in questions})
    return {"bits_per_person": got / people, "possible": possible / people, "exact_share": exact / len(questions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), seed=args.seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    warm = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda k: min((k + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(k / args.steps, 1.0)))),
    )
    begun = time.perf_counter()
    tokens = 0
    source = batches(tokenizer, args.batch_size, seed=args.seed)
    for step in range(1, args.steps + 1):
        ids = next(source)
        loss = loss_of(model, ids)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens += int((ids >= 0).sum())
        if step % 100 == 0:
            print(f"{step} loss {loss.item():.3f} {time.perf_counter() - begun:.0f} s", flush=True)
    seconds = round(time.perf_counter() - begun)
    model.half().float().eval()  # measured as it is stored
    known = draw_people(KNOWN_PEOPLE, seed=KNOWN_SEED, circle="known")
    measured = {
        "known": recalled(model, tokenizer, questions_about(known, templates.TRAINING)),
        "known, paraphrased": recalled(model, tokenizer, questions_about(known, templates.PARAPHRASES)),
        "new": recalled(model, tokenizer, read_builtin("rankwise:facts?n=200").questions["training"]),
    }
    report = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "tokens": tokens,
        "seconds": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "measured": measured,
    }
    print(json.dumps(report, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    config = json.loads((args.out / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half to stay small; computed in float32
    (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save_pretrained(args.out)
    (args.out / "pretraining.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
