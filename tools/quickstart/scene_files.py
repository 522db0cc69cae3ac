"""What the quick start works on: drawn scenes in five files, and the small base that is kept beside this module."""

import json
import shutil
from pathlib import Path

import numpy as np

from boxcar.pipelines import storage
from boxcar.schemas.errors import ConfigError
from boxcar.schemas.evaluation import ScenesConfig
from boxcar.schemas.record import Language
from boxcar.tools.quickstart.scenes import NEW_SHAPES, OLD_SHAPES, Style, draw_scene, phrase, write_scenes

BASE = Path(__file__).with_name("base")
_MARK = "scenes.json"


def is_drawn(config: ScenesConfig) -> bool:
    """Whether the folder holds exactly these scenes."""
    try:
        drawn = json.loads((Path(config.folder) / _MARK).read_text())
    except (OSError, ValueError):
        return False
    return bool(drawn == config.model_dump())


def draw(config: ScenesConfig) -> None:
    """train/, held_out/ and old/ with images and COCO files, base/ with the network. Raises ConfigError where there is something else."""
    folder = Path(config.folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARK).exists():
        raise ConfigError("scenes.folder", found=f"{folder}, which holds other files", expected="an empty or new folder")
    one, several = list(NEW_SHAPES), (2, 3)
    with storage.writing(folder):
        for part, number, seed in (("train", config.num_train, 1), ("held_out", config.num_held_out, 2)):
            # Four of five pictures hold one thing; in the others there are more, and telling them apart is the harder task.
            styles = []
            for language, share in (("en", 0.6), ("zh", 0.4)):
                total = round(number * share)
                styles += [
                    (Style(one, language), total - total // 5),  # type: ignore[arg-type]
                    (Style(one, language, num_things=several), total // 5),  # type: ignore[arg-type]
                ]
            write_scenes(folder / part, styles, config.seed * 3 + seed, part)
        write_scenes(folder / "old", [(Style(list(OLD_SHAPES)), max(10, config.num_held_out // 2))], config.seed * 3 + 3, "old")
        shutil.copytree(BASE, folder / "base", dirs_exist_ok=True)
        (folder / _MARK).write_text(json.dumps(config.model_dump()))


def new_images(config: ScenesConfig) -> list[tuple[Path, str, Language]]:
    """Three pictures that nobody has seen: (file, what to look for, in which language)."""
    folder = Path(config.folder) / "new"
    found: list[tuple[Path, str, Language]] = []
    rng = np.random.default_rng(config.seed * 3 + 1000)
    languages: tuple[Language, ...] = ("en", "en", "zh")
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, language in enumerate(languages, start=1):
            picture, things = draw_scene(rng, Style(list(NEW_SHAPES), language))
            path = folder / f"new_{number}.png"
            picture.save(path)
            found.append((path, phrase(things[0][0], things[0][1], language), language))
    return found
