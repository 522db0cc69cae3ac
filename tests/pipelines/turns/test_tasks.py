"""Which turns are made of a record, and that every choice hangs on the seed, the record and the item alone."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxcar.pipelines.families.catalog import FAMILIES
from boxcar.pipelines.families.prompts import CAPTION, DESCRIBE, LABEL_JOIN, NOT_FOUND, with_overrides
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.record import BoxMark, DialogueTurn, ImageMark, ImageRef, Language, Record, Region
from boxcar.schemas.task import TASK_NAMES as TASKS
from boxcar.schemas.task import TaskName
from boxcar.schemas.workflow import ConvertConfig, TaskConfig, TasksConfig
from tests.small_units import EVERY_TASK, convert, image, only, record, region, rows_of, settings

EVERY_FAMILY = sorted(FAMILIES)
ALWAYS = TaskConfig(share=1.0)


def turns_of(found: Record, config: ConvertConfig | None = None) -> list[dict[str, Any]]:
    return [turn for row in rows_of(convert(config or settings("qwen2_vl", tasks=EVERY_TASK), [found])) for turn in row["turns"]]


def made(found: Record, config: ConvertConfig | None = None) -> list[tuple[str, ...]]:
    """(task, labels) of every turn."""
    return [(turn["task"], *turn["labels"]) for turn in turns_of(found, config)]


LEFT, RIGHT, LOW = (10.0, 10.0, 60.0, 60.0), (300.0, 10.0, 400.0, 60.0), (10.0, 300.0, 60.0, 400.0)
SCENE = record(
    regions=(region("dog", LOW, "the wet dog"), region("cat", LEFT), region("dog", RIGHT, "an animal"), region("dog", LEFT, "an animal")),
    captions=("Two dogs.", "A cat."),
)

# ---- which turns there are


def test_a_label_is_asked_for_with_all_of_its_boxes_in_reading_order() -> None:
    turns = turns_of(SCENE, settings("qwen2_vl", tasks=only(detect=ALWAYS)))
    assert [(turn["task"], turn["labels"], turn["boxes"]) for turn in turns] == [
        ("detect", ["dog"] * 3, [list(LEFT), list(RIGHT), list(LOW)]),
        ("detect", ["cat"], [list(LEFT)]),
    ]
    assert all(turn["labels"][0] in turn["question"] for turn in turns)


def test_a_phrase_is_asked_for_with_all_of_its_boxes() -> None:
    turns = turns_of(SCENE, settings("qwen2_vl", tasks=only(refer=ALWAYS)))
    assert [(turn["labels"], turn["boxes"]) for turn in turns] == [
        (["the wet dog"], [list(LOW)]),
        (["an animal"] * 2, [list(LEFT), list(RIGHT)]),
    ]
    assert all(turn["labels"][0] in turn["question"] for turn in turns)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_several_labels_are_asked_for_in_one_turn_in_the_order_of_the_question(language: Language) -> None:
    orders = set()
    for seed in range(8):
        [turn] = turns_of(SCENE, settings("qwen2_vl", tasks=only(detect_joint=ALWAYS), languages={language: 1.0}, seed=seed))
        boxes = {"dog": [list(LEFT), list(RIGHT), list(LOW)], "cat": [list(LEFT)]}
        order = tuple(dict.fromkeys(turn["labels"]))
        assert turn["boxes"] == [box for label in order for box in boxes[label]]
        assert LABEL_JOIN[language].join(order) in turn["question"]
        orders.add(order)
    assert orders == {("dog", "cat"), ("cat", "dog")}


def test_one_label_is_no_joint_question() -> None:
    assert made(record(regions=(region("dog"), region("dog", LEFT))), settings("qwen2_vl", tasks=only(detect_joint=ALWAYS))) == []


def test_a_box_is_described_by_one_of_its_phrases_or_else_by_its_label() -> None:
    turns = turns_of(SCENE, settings("qwen2_vl", tasks=only(describe=ALWAYS)))
    assert [(turn["answer"], turn["boxes"]) for turn in turns] == [
        ("the wet dog", [list(LOW)]),
        ("cat", [list(LEFT)]),
        ("an animal", [list(RIGHT)]),
        ("an animal", [list(LEFT)]),
    ]
    assert all("<|box_start|>" in turn["question"] for turn in turns)
    assert all(not any(turn["answer_is_coordinate"]) for turn in turns)
    several = record(regions=(region("dog", LEFT, "one", "two", "three"),))
    answers = {turns_of(several, settings("qwen2_vl", tasks=only(describe=ALWAYS), seed=seed))[0]["answer"] for seed in range(20)}
    assert answers == {"one", "two", "three"}


ABSENT = [
    pytest.param({"absent": ("cat", "bird")}, {}, [("absent", "cat"), ("absent", "bird")], id="what the source verified"),
    pytest.param({"absent": ("cat", "bird", "cat")}, {}, [("absent", "cat"), ("absent", "bird")], id="twice is once"),
    pytest.param({"absent": ("dog", "the dog", "cat")}, {}, [("absent", "cat")], id="not what is there, by label or phrase"),
    pytest.param({"vocabulary": ("dog", "cat")}, {}, [("absent", "cat")], id="what a closed vocabulary leaves"),
    pytest.param(
        {"vocabulary": ("dog", "cat", "bird")}, {"max_per_sample": 5}, [("absent", "bird"), ("absent", "cat")], id="several of it"
    ),
    pytest.param({"vocabulary": ("dog",)}, {"max_per_sample": 5}, [], id="a vocabulary that is all there"),
    pytest.param({"absent": ("cat",), "vocabulary": ("dog", "bird")}, {}, [("absent", "cat")], id="the verified one goes first"),
    pytest.param({"absent": ("cat",), "not_exhaustive": ("cat",)}, {}, [], id="not what may be there all the same"),
    pytest.param({}, {}, [], id="nothing is known to be absent"),
]


@pytest.mark.parametrize(("fields", "limits", "expected"), ABSENT)
def test_only_what_is_verified_is_asked_for_as_absent(fields: dict[str, Any], limits: dict[str, int], expected: list[Any]) -> None:
    config = settings("qwen2_vl", tasks=only(absent=TaskConfig.model_validate({"share": 1.0, **limits})))
    found = made(record(regions=(region("dog", LEFT, "the dog"),), **fields), config)
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_the_answer_for_an_absent_thing_is_the_familys(family: str, language: Language) -> None:
    config = settings(family, tasks=only(absent=ALWAYS), languages={language: 1.0}, cutoff_len=min(4096, FAMILIES[family].max_sequence))
    [turn] = turns_of(record(absent=("cat",)), config)
    sentence = NOT_FOUND[language].replace("{label}", "cat")
    assert turn["answer"] == ("```json\n[]\n```" if family in ("qwen2_5_vl", "qwen3_vl") else sentence)
    assert turn["labels"] == ["cat"]
    assert turn["boxes"] == []
    assert FAMILIES[family].box_text.parse_answer(turn["answer"]) in (None, [])
    # A model must not learn from the wording that there is nothing.
    wordings = [FAMILIES[family].prompts[task][language] for task in ("absent", "detect")]
    assert wordings[0] == wordings[1]


def test_captions_are_asked_for_in_their_own_language() -> None:
    captions: dict[Language, str] = {"en": "Two dogs.", "zh": "两只狗。"}
    for language, caption in captions.items():
        found = record(captions=(caption,), language=language)
        [turn] = turns_of(found, settings("qwen2_vl", tasks=only(caption=ALWAYS), languages={"en": 0.5, "zh": 0.5}))
        assert turn["question"] in CAPTION[language]
        assert (turn["answer"], turn["language"]) == (caption, language)


def test_a_caption_needs_an_image() -> None:
    assert made(record("1", (), captions=("Two dogs.",))) == []


def test_regions_of_several_images_make_no_turns_but_are_counted() -> None:
    both = record(images=(image(), image()), regions=(region("dog"), region("cat", image_index=1)), captions=("A dog.",))
    result = convert(settings("qwen2_vl", tasks=EVERY_TASK), [both])
    assert result.counts.turns == {"caption": 1}
    assert {reason: entry.count for reason, entry in result.counts.turns_rejected.items()} == {"regions_of_several_images": 1}


@pytest.mark.parametrize("task", TASKS)
def test_a_share_of_nothing_switches_a_task_off(task: str) -> None:
    talk = (DialogueTurn((ImageMark(0), "Hi."), ("Hello.",)),)
    full = record(regions=SCENE.regions, captions=SCENE.captions, absent=("bird",), dialogue=talk)
    tasks = EVERY_TASK.model_copy(update={task: TaskConfig(share=0.0)})
    found = {turn["task"] for turn in turns_of(full, settings("qwen2_vl", tasks=tasks))}
    assert found == set(TASKS) - {task}


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_at_most_so_many_turns_of_a_kind_and_different_ones_for_different_seeds(limit: int) -> None:
    crowded = record(regions=tuple(region(f"thing {number}", LEFT) for number in range(6)))
    choices = set()
    for seed in range(12):
        tasks = only(detect=TaskConfig(share=1.0, max_per_sample=limit))
        found = made(crowded, settings("qwen2_vl", tasks=tasks, seed=seed))
        assert len(found) == limit
        assert found == sorted(found)  # chosen ones keep their order
        choices.add(tuple(found))
    assert len(choices) > 1


def test_weights_go_into_the_row() -> None:
    tasks = only(detect=TaskConfig(share=1.0, weight=0.5), caption=TaskConfig(share=1.0, weight=2.0))
    assert {turn["task"]: turn["weight"] for turn in turns_of(SCENE, settings("qwen2_vl", tasks=tasks))} == {"detect": 0.5, "caption": 2.0}


# ---- how they are worded


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_questions_come_from_the_familys_bank_in_the_language_asked_for(family: str, language: Language) -> None:
    chat, bank = FAMILIES[family].chat, FAMILIES[family].prompts
    cutoff = min(4096, FAMILIES[family].max_sequence)
    full = record(regions=SCENE.regions, absent=("bird",), captions=("Two dogs.",), language=language)
    for turn in turns_of(full, settings(family, tasks=EVERY_TASK, languages={language: 1.0}, cutoff_len=cutoff)):
        task: TaskName = turn["task"]
        labels = tuple(dict.fromkeys(turn["labels"]))
        assert turn["language"] == language
        question = turn["question"].removeprefix(chat.question_prefix).removesuffix(chat.question_suffix)
        prompts: Sequence[str] = bank[task][language]
        if task == "describe":
            opened = {tuple(prompt.split("{box}")) for prompt in DESCRIBE[language]}
            assert any(question.startswith(before) and question.endswith(after) for before, after in opened)
        else:
            named = LABEL_JOIN[language].join(labels)
            assert question in [prompt.replace("{label}", named) for prompt in prompts]


def test_both_languages_occur_where_both_are_wanted() -> None:
    config = settings("qwen2_vl", tasks=only(detect=ALWAYS), languages={"en": 0.5, "zh": 0.5})
    crowded = record(regions=tuple(region(f"thing {number}", LEFT) for number in range(40)))
    languages = [turn["language"] for turn in turns_of(crowded, config)]
    assert set(languages) == {"en", "zh"}


def test_prompts_of_the_workflow_replace_the_familys() -> None:
    tasks = only(
        detect=TaskConfig(share=1.0, prompts={"en": ("Any {label}?",)}),
        describe=TaskConfig(share=1.0, prompts={"en": ("And {box}?",)}),
        caption=TaskConfig(share=1.0, prompts={"en": ("Tell!",)}),
        absent=ALWAYS,
    )
    found = record(regions=(region("dog", (64, 48, 320, 240)),), absent=("cat",), captions=("A dog.",))
    questions = [turn["question"] for turn in turns_of(found, settings("qwen2_vl", tasks=tasks))]
    # Absent things are asked for as present ones are.
    assert questions == ["Any dog?", "And <|box_start|>(100,100),(500,500)<|box_end|>?", "Any cat?", "Tell!"]


def test_a_label_that_looks_like_a_slot_stays_as_it_is() -> None:
    found = record(regions=(region("{label} {box} %d", LEFT),), absent=("{label}",))
    turns = {turn["task"]: turn for turn in turns_of(found)}
    assert "{label} {box} %d" in turns["detect"]["question"]
    assert "<|object_ref_start|>{label} {box} %d<|object_ref_end|>" in turns["detect"]["answer"]
    assert turns["describe"]["answer"] == "{label} {box} %d"
    assert turns["absent"]["answer"] == "No {label} is in the image."


BAD_PROMPTS = [
    pytest.param("detect", "Find it.", "exactly once", id="no slot"),
    pytest.param("detect", "{label} and {label}", "exactly once", id="two slots"),
    pytest.param("refer", "Find {box}.", "exactly once", id="the wrong slot"),
    pytest.param("detect_joint", "Find all.", "exactly once", id="no list"),
    pytest.param("absent", "", "exactly once", id="empty"),
    pytest.param("describe", "What is {label}?", "exactly once", id="a label that would be the answer"),
    pytest.param("caption", "Describe {label}.", "no slot", id="a caption of a label"),
    pytest.param("caption", "Describe {box}.", "no slot", id="a caption of a box"),
]


@pytest.mark.parametrize(("task", "prompt", "expected"), BAD_PROMPTS)
def test_a_prompt_without_its_slot_is_refused(task: str, prompt: str, expected: str) -> None:
    tasks = TasksConfig.model_validate({task: {"share": 1, "prompts": {"zh": [prompt]}}})
    with pytest.raises(ConfigError, match=f"convert.tasks.{task}.prompts.zh: found .*{expected}"):
        with_overrides(FAMILIES["qwen2_vl"].prompts, tasks)


def test_a_list_of_no_prompts_is_refused() -> None:
    tasks = only(detect=TaskConfig(share=1.0, prompts={"en": ()}))
    with pytest.raises(ConfigError, match="found no prompt, expected one at least"):
        convert(settings("qwen2_vl", tasks=tasks), [SCENE])


def test_a_workflows_prompt_replaces_the_banks() -> None:
    bank = FAMILIES["qwen2_vl"].prompts
    assert with_overrides(bank, TasksConfig()) == bank
    changed = with_overrides(bank, TasksConfig(detect=TaskConfig(share=1.0, prompts={"en": ("Any {label}?",)})))
    assert changed["detect"]["en"] == ("Any {label}?",)
    assert changed["detect"]["zh"] == bank["detect"]["zh"]


# ---- dialogues

HELLO = DialogueTurn((ImageMark(0), "Where?"), (BoxMark((LEFT,), "dog"),))
AGAIN = DialogueTurn(("And now?",), ("Gone.",))


def test_a_dialogue_stands_in_order_beside_the_turns_of_its_regions() -> None:
    result = convert(
        settings("qwen2_vl", tasks=only(detect=ALWAYS, dialogue=ALWAYS)), [record(regions=(region("dog"),), dialogue=(HELLO, AGAIN))]
    )
    rows = rows_of(result)
    assert [(row["sample_id"], row["ordered"], [turn["task"] for turn in row["turns"]]) for row in rows] == [
        ("source/1", False, ["detect"]),
        ("source/1#dialogue", True, ["dialogue", "dialogue"]),
    ]
    assert [(turn["labels"], turn["boxes"]) for turn in rows[1]["turns"]] == [(["dog"], [list(LEFT)]), ([], [])]
    assert rows_of(convert(settings("qwen2_vl"), [record(dialogue=(HELLO,))]))[0]["sample_id"] == "source/1"


REJECTED_DIALOGUES = [
    pytest.param("cogvlm", (HELLO, AGAIN), "history_unsupported", id="a family without history"),
    pytest.param(
        "qwen2_vl", (HELLO, DialogueTurn(("Where?",), (BoxMark(((700, 0, 800, 9),)),))), "wrong_box_in_dialogue", id="a wrong box"
    ),
    pytest.param("qwen2_vl", (HELLO, DialogueTurn((" ",), ("Gone.",))), "empty_text", id="an empty question"),
    pytest.param("qwen2_vl", (HELLO, DialogueTurn(("And now?",), ("\n",))), "empty_text", id="an empty answer"),
    pytest.param("qwen2_vl", (HELLO, DialogueTurn(("And now?",), ("<|im_end|>",))), "special_token_in_text", id="a special token"),
    pytest.param("qwen2_vl", (HELLO, DialogueTurn(("\udc00",), ("Gone.",))), "invalid_unicode", id="half a letter"),
]


@pytest.mark.parametrize(("family", "dialogue", "reason"), REJECTED_DIALOGUES)
def test_a_dialogue_with_one_wrong_turn_is_rejected_as_a_whole(family: str, dialogue: tuple[DialogueTurn, ...], reason: str) -> None:
    result = convert(settings(family), [record(dialogue=dialogue), record("2", captions=("A dog.",), dialogue=dialogue)])
    assert {found: entry.count for found, entry in result.counts.records_rejected.items()} == {reason: 1}
    assert result.counts.turns == {"caption": 1}
    assert {found: entry.count for found, entry in result.counts.turns_rejected.items()} == {reason: len(dialogue)}


def test_chat_families_answer_every_turn_with_its_history() -> None:
    result = convert(settings("cogvlm_chat", cutoff_len=2048), [record(dialogue=(HELLO, AGAIN))])
    [row] = rows_of(result)
    assert not row["ordered"]
    assert [turn["question"].count("Question:") for turn in row["turns"]] == [1, 2]
    assert row["turns"][1]["boxes"] == [list(LEFT)]
    assert row["turns"][1]["labels"] == ["dog"]


def test_a_box_mark_without_boxes_is_the_readers_mistake() -> None:
    with pytest.raises(AssertionError, match="no boxes"):
        convert(settings("qwen2_vl"), [record(dialogue=(DialogueTurn((ImageMark(0), "Where?"), ("It is ", BoxMark(()), ".")),))])


# ---- choices by hash

names = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=6, unique=True)


def chosen(labels: Sequence[str], *, record_id: str = "1", seed: int = 0, captions: Sequence[str] = ()) -> dict[str, tuple[str, str]]:
    """Label -> (question, language) of the detect turns that a share of a half makes."""
    config = settings(
        "qwen2_vl", tasks=only(detect=TaskConfig(share=0.5), caption=TaskConfig(share=0.5)), languages={"en": 0.5, "zh": 0.5}, seed=seed
    )
    found = Record(record_id, "row", (ImageRef("a.jpg", 640, 480),), tuple(Region(LEFT, label) for label in labels), tuple(captions))
    return {turn["labels"][0]: (turn["question"], turn["language"]) for turn in turns_of(found, config) if turn["task"] == "detect"}


@given(names, st.data())
def test_a_choice_hangs_on_nothing_but_seed_record_and_item(labels: list[str], data: st.DataObject) -> None:
    alone = {label: choice for label in labels for choice in [chosen([label]).get(label)] if choice}
    order = data.draw(st.permutations(labels))
    assert chosen(order) == alone
    assert chosen(labels, captions=("A dog.", "Two.")) == alone
    # A record's place in its source and its picture mean nothing.
    assert chosen(labels, record_id="2") == chosen(order, record_id="2")


def test_other_seeds_and_other_records_choose_otherwise() -> None:
    labels = [f"thing {number}" for number in range(30)]
    by_seed = {tuple(sorted(chosen(labels, seed=seed))) for seed in range(10)}
    by_record = {tuple(sorted(chosen(labels, record_id=str(number)))) for number in range(10)}
    assert len(by_seed) == len(by_record) == 10
