"""CogVLM and Qwen-VL, whose networks are ours, the whole way round: convert, train, open, ask, measure."""

from pathlib import Path

import numpy as np
import pytest
import torch

from boxcar.schemas.errors import ConfigError
from boxcar.schemas.evaluation import EvaluateConfig
from boxcar.tools.quickstart.tiny_base import write_tiny_base
from boxcar.train.answering.adapter import open_adapter
from boxcar.train.answering.ask import Asker, Query
from boxcar.train.answering.predict import PredictConfig, Predictor
from boxcar.train.data.documents import prompt_of
from boxcar.train.data.store import ShardStore
from boxcar.train.network.model import open_base
from boxcar.train.scoring.evaluate import evaluate
from tests.small_adapter import train_adapter
from tests.small_sets import copy_demo, demo_config, run
from tests.small_tokenizers import TOKENIZER_OF_FAMILY, folder_of

FAMILIES = ("cogvlm_224", "cogvlm_chat", "qwen_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(family, scenes with shards, run folder)."""
    family: str = request.param
    folder = copy_demo(demo, tmp_path_factory.mktemp(family) / "demo")
    tokenizer = folder_of(TOKENIZER_OF_FAMILY[family])
    run(demo_config(folder, folder / "shards", family=family, tokenizer=tokenizer, cutoff_len=2048, records_per_shard=16))
    write_tiny_base(folder / "base", family, tokenizer)
    return family, folder, train_adapter(folder / "shards", folder / "base", folder / "runs", num_steps=2)


def test_a_question_is_that_of_the_shards_and_is_answered(trained: tuple[str, Path, Path]) -> None:
    family, folder, run_folder = trained
    opened = open_adapter(str(run_folder), torch.device("cpu"), torch.float32)
    store = ShardStore([str(folder / "shards")])
    row = store.whole_row(0)
    turn = next(turn for turn in row["turns"] if turn["task"] == "detect")
    place = row["turns"].index(turn)
    bank = opened.frame.bank["detect"]["en"]
    queries = [Query(row["images"][0]["path"], turn["labels"][0], "detect", prompt=choice) for choice in range(len(bank))]
    (asked,) = [one for one in map(Asker(opened.frame).row, queries) if one["turns"][0]["question"] == turn["question"]]
    mine = prompt_of(asked, 0, store.contract, opened.frame.family.network)
    theirs = prompt_of(row, place, store.contract, opened.frame.family.network)
    assert np.array_equal(mine.input_ids, theirs.input_ids)
    assert np.array_equal(mine.positions, theirs.positions)
    answers = list(Predictor(opened, PredictConfig(max_new_tokens=3, with_logprobs=True)).ask(queries[:2]))
    assert answers[0].num_prompt_tokens > 200
    assert all(answer.status for answer in answers), family


def test_it_is_measured(trained: tuple[str, Path, Path]) -> None:
    _, folder, run_folder = trained
    config = EvaluateConfig.model_validate(
        {"shards": [str(folder / "shards")], "max_samples": 2, "max_new_tokens": 3, "use_gpu": False, "allow_leakage": True}
    )
    results = evaluate(config, str(run_folder))
    assert list(results["arms"]) == ["adapter", "base"]


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    from boxcar.pipelines.families.catalog import find_family  # noqa: PLC0415

    write_tiny_base(tmp_path / "base", "cogvlm", folder_of("vicuna"))
    with pytest.raises(ConfigError, match="for images of 490 px, expected 224 px, as the shards were counted"):
        open_base(str(tmp_path / "base"), find_family("cogvlm_224"), 0, random_weights=True, dtype=torch.float32, packed=True)
