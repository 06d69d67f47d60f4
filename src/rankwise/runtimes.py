"""What serving runtimes do with an adapter: the factor they apply, what they leave unread, what they refuse.

In: nothing, or a name and a rank. Out: `RUNTIMES`, one row a runtime, each read in that runtime's source at
the version that the row names. A row says what was read, not what ought to be: where `verified` is False,
the factor was read in an older copy or taken from a thread, as its facts say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from rankwise.errors import UsageError
from rankwise.scaling import scaling


@dataclass(frozen=True, slots=True)
class Runtime:
    """One serving runtime. None means that it could not be told.

    Attributes:
        name: as `--for` takes it.
        version: the commit or release that was read.
        read: when, as year and month.
        source: the file that decides the factor.
        threads: where its users and makers talk about it.
        verified: whether the factor was read in the source at `version`, and not in an older copy or a thread.
        reads_config: whether adapter_config.json is read at all.
        uses_rslora: whether `use_rslora` changes the factor.
        reads_rank_pattern: whether the factor follows a module's own rank.
        reads_alpha_pattern: whether the factor follows a module's own alpha.
        accepts: the values that its cap on the rank may be set to; None where any rank will do.
        default_cap: the cap that holds if none is set.
        cap_flag: the setting that raises the cap.
        integer_alpha: whether `lora_alpha` has to be a whole number, written as one.
        takes_modules_to_save: whether whole weights beside the factors are loaded.
        takes_embeddings: whether factors of embedding tables are loaded.
        takes_dora: whether DoRA's magnitudes are loaded.
        takes_bias: whether trained biases are loaded.
        facts: what else is worth knowing, a sentence each.
    """

    name: str
    version: str
    read: str
    source: str
    threads: tuple[str, ...]
    verified: bool
    reads_config: bool
    uses_rslora: bool
    reads_rank_pattern: bool
    reads_alpha_pattern: bool
    accepts: tuple[int, ...] | None
    default_cap: int | None
    cap_flag: str | None
    integer_alpha: bool
    takes_modules_to_save: bool | None
    takes_embeddings: bool | None
    takes_dora: bool | None
    takes_bias: bool | None
    facts: tuple[str, ...]

    def applied(
        self,
        r_of_tensor: int,
        alpha_of_module: float,
        *,
        global_r: int,
        global_alpha: float,
        use_rslora: bool,
        alpha_stored: bool = False,
    ) -> float:
        """Return the factor on B @ A that this runtime applies to one module.

        Args:
            r_of_tensor: rank of this module's factors.
            alpha_of_module: alpha that was meant for this module (by `alpha_pattern`, or stored beside it).
            global_r: `r` of adapter_config.json.
            global_alpha: `lora_alpha` of adapter_config.json.
            use_rslora: as adapter_config.json says.
            alpha_stored: whether the weights file itself carries the alpha, as kohya's `.alpha` tensors do.

        Raises:
            ScalingError: a rank or an alpha is no positive number.

        >>> asked = {"global_r": 8, "global_alpha": 16.0, "use_rslora": True}
        >>> [RUNTIMES[name].applied(64, 32.0, **asked) for name in ("peft", "llama.cpp", "comfyui")]
        [4.0, 0.25, 1.0]
        """
        if not self.reads_config:
            return scaling("lora", alpha_of_module, r_of_tensor) if alpha_stored else 1.0
        rule = "rslora" if use_rslora and self.uses_rslora else "lora"
        alpha = alpha_of_module if self.reads_alpha_pattern else global_alpha
        return scaling(rule, alpha, r_of_tensor if self.reads_rank_pattern else global_r)


RUNTIMES: Final[dict[str, Runtime]] = {
    "peft": Runtime(
        name="peft",
        version="0.21.2",
        read="2026-11",
        source="peft/tuners/lora/layer.py",
        threads=("https://github.com/huggingface/peft/pull/2195",),
        verified=True,
        reads_config=True,
        uses_rslora=True,
        reads_rank_pattern=True,
        reads_alpha_pattern=True,
        accepts=None,
        default_cap=None,
        cap_flag=None,
        integer_alpha=False,
        takes_modules_to_save=True,
        takes_embeddings=True,
        takes_dora=True,
        takes_bias=True,
        facts=("What PEFT applies is what was trained, except through `add_weighted_adapter` under rsLoRA.",),
    ),
    "vllm": Runtime(
        name="vllm",
        version="e745bafffc44",
        read="2026-11",
        source="vllm/lora/peft_helper.py",
        threads=(
            "https://github.com/vllm-project/vllm/issues/59799",
            "https://github.com/vllm-project/vllm/issues/55545",
            "https://github.com/vllm-project/vllm/issues/2847",
        ),
        verified=True,
        reads_config=True,
        uses_rslora=True,
        reads_rank_pattern=False,
        reads_alpha_pattern=False,
        accepts=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        default_cap=16,
        cap_flag="--max-lora-rank",
        integer_alpha=False,
        takes_modules_to_save=False,
        takes_embeddings=None,
        takes_dora=False,
        takes_bias=False,
        facts=(
            "Fields of adapter_config.json that it does not know are dropped without a word; both patterns are such.",
            "The rank that is held against the cap is `r` of the config, not that of the tensors.",
            "Versions before September 2026 ignored use_rslora for the experts of a mixture.",
        ),
    ),
    "sglang": Runtime(
        name="sglang",
        version="db2a4cc1f9e2 (lora.py, an older copy), 0ceb81fe4868 (lora_config.py)",
        read="2026-11",
        source="python/sglang/srt/lora/lora.py",
        threads=("https://github.com/sgl-project/sglang/issues/40835",),
        verified=False,
        reads_config=True,
        uses_rslora=False,
        reads_rank_pattern=False,
        reads_alpha_pattern=False,
        accepts=None,
        default_cap=None,
        cap_flag="--max-lora-rank",
        integer_alpha=False,
        takes_modules_to_save=None,
        takes_embeddings=None,
        takes_dora=False,
        takes_bias=None,
        facts=(
            "The factor was read in an older copy; issue 40835 says that it was still alpha / r in September 2026.",
            "Patterns are read to decide whether an adapter fits into memory, not for its factor.",
            "An adapter folder with added_tokens.json is refused.",
        ),
    ),
    "llama.cpp": Runtime(
        name="llama.cpp",
        version="0b03adaa632b (convert_lora_to_gguf.py), 215841fc0178 (src/llama-adapter.h)",
        read="2026-11",
        source="convert_lora_to_gguf.py",
        threads=(
            "https://github.com/ggml-org/llama.cpp/pull/8332",
            "https://github.com/ggml-org/llama.cpp/issues/11554",
        ),
        verified=True,
        reads_config=True,
        uses_rslora=False,
        reads_rank_pattern=True,
        reads_alpha_pattern=False,
        accepts=None,
        default_cap=None,
        cap_flag=None,
        integer_alpha=False,
        takes_modules_to_save=False,
        takes_embeddings=True,
        takes_dora=False,
        takes_bias=False,
        facts=(
            "A GGUF adapter holds one alpha; each tensor is scaled by that alpha over its own rank.",
            "The converter stops at whole weights other than norms, and at DoRA's magnitudes.",
        ),
    ),
    "ollama": Runtime(
        name="ollama",
        version="fb3076099687",
        read="2026-11",
        source="convert/convert.go",
        threads=("https://github.com/ollama/ollama/pull/17377",),
        verified=True,
        reads_config=True,
        uses_rslora=False,
        reads_rank_pattern=True,
        reads_alpha_pattern=False,
        accepts=None,
        default_cap=None,
        cap_flag=None,
        integer_alpha=True,
        takes_modules_to_save=None,
        takes_embeddings=None,
        takes_dora=None,
        takes_bias=None,
        facts=(
            "A lora_alpha with a decimal point, 16.0 as well as 22.6, stops the conversion.",
            "Adapter folders of Llama and Gemma 2 models only are converted; it then runs llama.cpp.",
        ),
    ),
    "tensorrt-llm": Runtime(
        name="tensorrt-llm",
        version="007e181b5366",
        read="2026-11",
        source="tensorrt_llm/lora_manager.py",
        threads=("https://github.com/NVIDIA/TensorRT-LLM/issues/1668",),
        verified=True,
        reads_config=True,
        uses_rslora=True,
        reads_rank_pattern=True,
        reads_alpha_pattern=False,
        accepts=None,
        default_cap=64,
        cap_flag="max_lora_rank",
        integer_alpha=False,
        takes_modules_to_save=True,
        takes_embeddings=False,
        takes_dora=True,
        takes_bias=False,
        facts=(
            "Of modules_to_save only embed_tokens and lm_head are loaded.",
            "Factors of embed_tokens and lm_head are passed over without a word.",
            "Any other tensor that is no factor, a bias for one, stops it.",
        ),
    ),
    "comfyui": Runtime(
        name="comfyui",
        version="0323d8746da9",
        read="2026-11",
        source="comfy/weight_adapter/lora.py",
        threads=("https://github.com/WalkingMeatAxolotl/AnimaLoraStudio/issues/241",),
        verified=True,
        reads_config=False,
        uses_rslora=False,
        reads_rank_pattern=True,
        reads_alpha_pattern=True,
        accepts=None,
        default_cap=None,
        cap_flag=None,
        integer_alpha=False,
        takes_modules_to_save=None,
        takes_embeddings=None,
        takes_dora=None,
        takes_bias=None,
        facts=("It reads the weights file alone: alpha has to stand in it as a `.alpha` tensor of each module.",),
    ),
    "diffusers": Runtime(
        name="diffusers",
        version="58eb52c0803e",
        read="2026-08",
        source="src/diffusers/utils/peft_utils.py",
        threads=("https://github.com/huggingface/diffusers/pull/14409",),
        verified=True,
        reads_config=False,
        uses_rslora=False,
        reads_rank_pattern=True,
        reads_alpha_pattern=True,
        accepts=None,
        default_cap=None,
        cap_flag=None,
        integer_alpha=False,
        takes_modules_to_save=None,
        takes_embeddings=None,
        takes_dora=True,
        takes_bias=None,
        facts=(
            "Its own files carry the whole LoraConfig in the header; with it, every module gets what was trained.",
            "Before August 2026, mixed ranks without alpha tensors took the first module's rank as everyone's alpha.",
        ),
    ),
}
"""Name -> what was read. `peft` is the truth that the others are held to."""


def runtime(name: str) -> Runtime:
    """Return one row of `RUNTIMES`.

    Raises:
        UsageError: no row of that name.
    """
    found = RUNTIMES.get(name.lower())
    if found is None:
        raise UsageError(f"no runtime is called {name!r:.60}; known are: {', '.join(sorted(RUNTIMES))}")
    return found


def padded_rank(name: str, r: int) -> int:
    """Return the smallest rank of `r` or more that a runtime's cap may be set to.

    Args:
        name: of the runtime, as in `RUNTIMES`.
        r: the largest rank of the adapter.

    Raises:
        UsageError: there is no such runtime, or none of its values reaches `r`.

    >>> padded_rank("vllm", 48), padded_rank("llama.cpp", 48)
    (64, 48)
    """
    row = runtime(name)
    if row.accepts is None:
        return r
    fitting = [value for value in row.accepts if value >= r]
    if not fitting:
        raise UsageError(
            f"{row.name} takes adapters up to rank {max(row.accepts)} ({row.cap_flag}), and this one has rank {r}; "
            "cut it to that rank, or merge it into the model"
        )
    return min(fitting)
