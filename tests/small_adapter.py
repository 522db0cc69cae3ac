"""Adapters on tiny bases: as training leaves them, without training (random LoRA weights); and by a step or two of real training."""

from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from boxcar.pipelines.families.catalog import find_family
from boxcar.schemas import manifest as manifests
from boxcar.schemas.adapter import CARD, AdapterCard, BaseRecord
from boxcar.schemas.training import LoraConfig, TrainConfig
from boxcar.train.answering.adapter import WEIGHTS, config_hash
from boxcar.train.job import train
from boxcar.train.network.model import attach_lora, open_base


def train_adapter(shards: Path, base: Path, output: Path, num_steps: int = 1) -> Path:
    """The folder of a run of some steps in this process. base: a folder with config.json; its weights are random by seed."""
    settings = {
        "shards": [str(shards)],
        "base": str(base),
        "init": "random",
        "output": str(output),
        "precision": "fp32",
        "global_batch": 1,
        "max_steps": num_steps,
        "loader_workers": 0,
        "trackers": [],
        "placement": {"executor": "inline", "use_gpu": False},
    }
    return Path(train(TrainConfig.model_validate(settings), "demo")["folder"])


def write_adapter(folder: Path, base: Path, shards: Path, *, pretrained: Path | None = None, seed: int = 0) -> Path:
    """An adapter that changes replies. pretrained: where the tiny base's weights are saved; None: they are random by seed."""
    manifest = manifests.load(shards)
    family = find_family(manifest.contract.family)
    opened = open_base(
        str(base), family, manifest.contract.image_token_id, random_weights=True, dtype=torch.float32, packed=False, seed=seed
    )
    if pretrained is not None:
        opened.model.save_pretrained(pretrained)
    model = attach_lora(opened, LoraConfig(rank=4, parts=("language", "vision")), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    folder.mkdir(parents=True)
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = str(pretrained or base)
    settings.inference_mode = True
    settings.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    where = pretrained or base
    card = AdapterCard(
        contract=manifest.contract,
        base=BaseRecord(name=str(where), config_xxh3_128=config_hash(str(where)), random_seed=None if pretrained else seed),
        method="lora",
        trained_turns={"detect": 1},
        train_shards={str(shards): manifest.manifest_xxh3_128},
        to_original_pixels=family.grid.inverse_description,
    )
    (folder / CARD).write_bytes(card.dumps())
    return folder
