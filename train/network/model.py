"""The base model, its adapters, and how a micro-batch goes through them.

    open_base        a folder, a hub id, or random weights -> a network whose attention keeps packed samples apart
    attach           adapters (peft) or full parameters -> what is trained
    hidden_states    MicroBatch -> the last hidden states
    part_of          name of a parameter -> language, merger or vision

Families differ here only in the data of `pipelines.families` (names of parts and of layers) and in one question: is the network one of
transformers' Qwen-VL modules, or one of ours (`train.network.native`)?
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from boxcar.pipelines.families.family import Family, Network
from boxcar.schemas.errors import ConfigError
from boxcar.train.data import pixels
from boxcar.train.network.attention import SEGMENTS, TEXT_ATTENTION, VISION_ATTENTION, Segments, text_attention, vision_attention
from boxcar.train.network.native.catalog import NATIVE, open_config

if TYPE_CHECKING:
    from boxcar.schemas.training import LoraConfig, NetworkPart
    from boxcar.train.data.collate import MicroBatch

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Base:
    """A network with what the loop must know of it."""

    model: PreTrainedModel
    family: Family
    image_token_id: int
    packed: bool
    native: bool

    def hidden_states(self, batch: "MicroBatch") -> torch.Tensor:
        """(B, T, hidden): the last hidden states, after the final norm. The batch is on the model's device."""
        if self.packed:
            SEGMENTS.current = Segments(batch.cu_seqlens, batch.borders)
        has_images = len(batch.image_sizes_hw) > 0
        images = pixels.images_of(batch, self.family, self.vision_dtype) if has_images else None
        if self.native:
            states: torch.Tensor = self.model.hidden_states(
                batch.input_ids, batch.positions[0], images, batch.input_ids == self.image_token_id, batch.attention_mask
            )
            return states
        outputs = self.model.model(
            input_ids=batch.input_ids,
            # Four rows (text, time, row, column) make transformers keep documents apart; padded rows want the three of M-RoPE.
            position_ids=batch.positions if self.packed else batch.positions[1:],
            attention_mask=None if self.packed else batch.attention_mask,
            pixel_values=images,
            image_grid_thw=batch.image_grid_thw if has_images else None,
            use_cache=False,  # or transformers 5 builds a mask that lets packed samples see each other
        )
        states = outputs.last_hidden_state
        return states

    @property
    def head(self) -> nn.Module:
        head: nn.Module = self.model.get_output_embeddings()
        return head

    @property
    def vision_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.vision.parameters()).dtype
        return dtype

    @property
    def vision(self) -> Any:
        return self.model.get_submodule(self.family.network.vision_module)


# ---- opening


def open_base(
    base: str,
    family: Family,
    image_token_id: int,
    *,
    random_weights: bool,
    dtype: torch.dtype,
    packed: bool,
    seed: int = 0,
    quantise: bool = False,
) -> Base:
    """Load a base and check that it fits the family. Raises ConfigError where it does not, or cannot be found."""
    if quantise and random_weights:
        raise ConfigError(
            "train.init", found="random with method: qlora", expected="pretrained: weights are quantised as they load", fix="Use lora."
        )
    native = family.network.model_type in NATIVE
    config = _config(base, family.network)
    _check_fit(base, config, family, image_token_id)
    model = _random(config, family.network, dtype, seed) if random_weights else _pretrained(base, config, family.network, dtype, quantise)
    if packed:
        _keep_apart(model, native)
    elif not native:
        model.set_attn_implementation("sdpa")
    return Base(model, family, image_token_id, packed, native)


def _config(base: str, network: Network) -> PreTrainedConfig:
    if not base:
        raise ConfigError("train.base", found="nothing", expected="a folder or Hugging Face id of the base model")
    try:
        return open_config(base) if network.model_type in NATIVE else AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        where = "that folder" if Path(base).is_dir() else "the Hugging Face hub"
        raise ConfigError(
            "train.base",
            found=f"{base!r}, and no usable config.json in {where} ({str(error).splitlines()[0][:200]})",
            expected=f"a base of model_type {network.model_type!r}",
            fix="Give the folder that holds config.json and the weights.",
        ) from error


def _check_fit(base: str, config: PreTrainedConfig, family: Family, image_token_id: int) -> None:
    network = family.network
    if config.model_type != network.model_type:
        raise ConfigError(
            "train.base",
            found=f"{base!r}, a base of model_type {config.model_type!r}",
            expected=f"{network.model_type!r}: the shards were made for {family.title}",
            fix="Choose a base of that family, or convert again for this one.",
        )
    vocabulary = config.get_text_config().vocab_size
    if image_token_id >= vocabulary:
        raise ConfigError(
            "train.base",
            found=f"{base!r} with a vocabulary of {vocabulary}",
            expected=f"one that holds the shards' image token {image_token_id}",
            fix="Base and tokenizer are not of one model.",
        )
    if (misfit := family.resize.misfit(_vision_section(config, network), family.title)) is not None:
        raise ConfigError("train.base", found=f"{base!r} {misfit.found}", expected=misfit.expected, fix=misfit.fix)
    if getattr(config, "image_token_id", image_token_id) != image_token_id:
        raise ConfigError(
            "train.base",
            found=f"{base!r} with image_token_id {config.image_token_id} in its config.json",
            expected=f"{image_token_id}, the shards' image token",
            fix="Base and tokenizer are not of one model.",
        )


def _vision_section(config: PreTrainedConfig, network: Network) -> dict[str, Any]:
    name = NATIVE[network.model_type].vision_section if network.model_type in NATIVE else "vision_config"
    return config.to_dict().get(name) or {}


def _random(config: PreTrainedConfig, network: Network, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network.model_type in NATIVE:
            ours: PreTrainedModel = NATIVE[network.model_type].model(config).to(dtype)
            return ours
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return model


def _pretrained(base: str, config: PreTrainedConfig, network: Network, dtype: torch.dtype, quantise: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"config": config, "dtype": dtype}
    if quantise:
        options["quantization_config"] = _four_bits(dtype)
    opener = NATIVE[network.model_type].model if network.model_type in NATIVE else AutoModelForImageTextToText
    try:
        with _without_bar():
            model, report = opener.from_pretrained(base, output_loading_info=True, **options)
    except OSError as error:
        raise ConfigError(
            "train.base",
            found=f"{base!r} without weights that load ({str(error).splitlines()[0][:200]})",
            expected="safetensors beside config.json",
            fix="`init: random` trains the bare architecture, for trials.",
        ) from error
    except ImportError as error:
        if not quantise:
            raise
        raise ConfigError(
            "train.method",
            found=f"qlora, for which transformers says: {error}",
            expected="a bitsandbytes that quantises on this device",
            fix="pip install -U bitsandbytes",
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            "train.base",
            found=f"{base!r} without {len(missing)} of the network's weights ({', '.join(missing[:3])}, ...)",
            expected="every weight",
            fix="The checkpoint is incomplete, or of another model.",
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers draws a bar of its own for the weights."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """peft asks transformers in words that it will drop: nothing that a user could mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _four_bits(dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401, PLC0415  (an option that few have)
    except ImportError as error:
        raise ConfigError(
            "train.method", found="qlora without bitsandbytes", expected="that package", fix="pip install bitsandbytes"
        ) from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def in_rows(base: Base) -> None:
    """Make a network that reads packs read rows, for generation. `in_packs` undoes it."""
    if base.native:
        base.model.packed = False
    else:
        base.model.set_attn_implementation("sdpa")


def in_packs(base: Base) -> None:
    """Make a network read packs again."""
    _keep_apart(base.model, base.native)


def _keep_apart(model: PreTrainedModel, native: bool) -> None:
    if native:
        model.packed = True
        return
    AttentionInterface.register(TEXT_ATTENTION, text_attention)
    AttentionInterface.register(VISION_ATTENTION, vision_attention)
    model.set_attn_implementation({"text_config": TEXT_ATTENTION, "vision_config": VISION_ATTENTION})


def recompute_activations(base: Base, *, gathered_weights: bool) -> None:
    """Gradient checkpointing of every layer: activations are computed again in backward.

    gathered_weights: ZeRO-3, where weights have another shape outside their layer. torch's checkpoint without re-entry compares what is
    computed again with the first time, shapes included, so the reentrant kind serves there. That one passes gradients only where an input
    needs one: the inputs of the decoder are made to, and those of a vision tower that is trained. Call it after the adapters are attached.
    """
    model = base.model
    # transformers 5.2x renamed the method; GPU images hold older ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": gathered_weights})
    # transformers makes what comes out of the embeddings ask for gradients, patches included. Only the reentrant kind needs that, and a
    # vision tower without adapters would be computed again, and go through all of backward, for nothing.
    model.disable_input_require_grads()
    if gathered_weights:
        model.get_input_embeddings().register_forward_hook(_with_gradient)
        network = base.family.network
        if any(weight.requires_grad and part_of(name, network) == "vision" for name, weight in model.named_parameters()):
            base.vision.register_forward_pre_hook(_pixels_with_gradient, with_kwargs=True)


def pad_frozen_vision(base: Base, multiple: int = 64) -> int:
    """Fill the MLPs of a frozen vision tower up with zeros to a width that tensor cores take. Returns how many layers grew.

    Qwen2.5-VL's are 3,420 wide, which is no multiple of 8: no Hopper kernel takes it, and the tower runs on slower ones. A gate of 0 times
    an up of 0 adds 0, and so does an activation of 0 (GELU, SiLU): results are equal. Names stay, so that adapters elsewhere load as they
    are; call it after weights have been counted, and never where the base itself is saved.
    """
    if any(weight.requires_grad for weight in base.vision.parameters()):
        return 0
    grown = 0
    for module in base.vision.modules():
        names = [name for name in ("gate_proj", "up_proj", "fc1", "linear_fc1") if isinstance(getattr(module, name, None), nn.Linear)]
        last = next((getattr(module, name) for name in ("down_proj", "fc2", "linear_fc2") if hasattr(module, name)), None)
        if not names or not isinstance(last, nn.Linear) or not (missing := -last.in_features % multiple):
            continue
        if any(getattr(module, name).out_features != last.in_features for name in names):
            continue  # a merger, whose first layer is of another kind
        for name in names:
            first = getattr(module, name)
            first.weight = nn.Parameter(nn.functional.pad(first.weight, (0, 0, 0, missing)), requires_grad=False)
            if first.bias is not None:
                first.bias = nn.Parameter(nn.functional.pad(first.bias, (0, missing)), requires_grad=False)
            first.out_features += missing
        last.weight = nn.Parameter(nn.functional.pad(last.weight, (0, missing)), requires_grad=False)
        last.in_features += missing
        grown += len(names) + 1
    return grown


def recompute_first_layers(base: Base, num_layers: int) -> None:
    """Of the decoder layers whose activations are computed again, only the first ones go on with it. Call it after
    `recompute_activations`, and before or after `compile_layers`."""
    for number, layer in enumerate(base.model.get_submodule(base.family.network.decoder_layers).children()):
        layer.gradient_checkpointing = number < num_layers


def _with_gradient(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _pixels_with_gradient(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def marked(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.detach().requires_grad_() if floating and torch.is_grad_enabled() else value

    return tuple(map(marked, arguments)), {name: marked(value) for name, value in named.items()}


# ---- what is trained


def attach_lora(base: Base, lora: "LoraConfig", *, seed: int, quantised: bool = False) -> PreTrainedModel:
    """Freeze the base and put adapters on the layers of these parts. Returns the peft model; `base.model` now holds the adapters, too."""
    import peft  # noqa: PLC0415  (full fine-tuning needs none)

    network = base.family.network
    if quantised:
        peft.prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=False)
    pattern = "|".join(f"({network.lora_targets[part]})" for part in lora.parts)
    with torch.random.fork_rng(devices=[]), without_future_warnings():
        torch.manual_seed(seed)  # every rank starts from the same adapters
        model: PreTrainedModel = peft.get_peft_model(
            base.model,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=pattern,
                use_rslora=lora.use_rslora,
                use_dora=lora.use_dora,
                task_type="CAUSAL_LM",
            ),
        )
    return model


def unfreeze(base: Base, parts: Sequence["NetworkPart"]) -> None:
    """Full fine-tuning of these parts; all others are frozen."""
    for name, parameter in base.model.named_parameters():
        parameter.requires_grad_(part_of(name, base.family.network) in parts)


def part_of(name: str, network: Network) -> "NetworkPart":
    """Which part a parameter belongs to, by its name in the network or under peft."""
    plain = name.removeprefix(_PEFT_PREFIX)
    for part, pattern in network.part_names.items():
        if re.match(pattern, plain):
            return part
    raise AssertionError(f"{name} belongs to no part of {network.model_type}: its family file must name it")


def compile_layers(base: Base) -> None:
    """torch.compile on the decoder layers, each at its first call; attention stays as it is (`train.network.attention`).

    Call it after `recompute_activations`.
    """
    for layer in base.model.get_submodule(base.family.network.decoder_layers).children():
        if layer.gradient_checkpointing:
            layer._gradient_checkpointing_func = _compiled_beneath(layer._gradient_checkpointing_func)
        else:
            layer.compile()


def _compiled_beneath(recompute: Callable[..., Any]) -> Callable[..., Any]:
    """A way to recompute activations that compiles what it runs.

    A compiled region that holds torch's checkpoint must not be left in the middle, as attention does: all of it would run as it is, without
    a word. What runs beneath the checkpoint may be compiled in pieces.
    """
    compiled = cache(torch.compile)

    def run(function: "partial[Any]", *inputs: Any) -> Any:
        return recompute(partial(compiled(function.func), *function.args, **function.keywords), *inputs)

    return run


def parameter_groups(model: nn.Module, network: Network, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters by part, as an optimizer takes them; each group says its `part`."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(part_of(name, network), []).append(parameter)
    return [{"params": parameters, "part": part, "weight_decay": weight_decay} for part, parameters in sorted(groups.items())]
