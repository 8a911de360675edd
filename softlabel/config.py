"""What a recipe may say: frozen models that forbid unknown keys. recipe_file.py reads and writes them.

Everything here determines a result and enters the hash of the step that reads it, except ``execution``: more GPUs or
workers for labelling never cause work to be redone. (Training does depend on the world size; it is recorded with the
numbers.)
"""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from softlabel.records import Nms

Fraction = Annotated[float, Field(ge=0, le=1)]
Threshold = Fraction | dict[str, Fraction]
"""One for all classes, or one per class, by name."""
Pixels = Annotated[int, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Synthetic(_Section):
    """Made-up scenes with truth, written before tiling (softlabel.imagery.synthetic)."""

    num_scenes: Annotated[int, Field(gt=0)] = Field(40, description="GeoTIFF files to write")
    scene_size_px: Annotated[int, Field(ge=128)] = Field(512, description="width and height of a scene")
    difficulty: Fraction = Field(0.3, description="0: crisp and plain, 1: blurred, noisy, full of look-alikes")


class TruthSource(_Section):
    """Where the boxes that people drew are, and which of their classes map to which of ours."""

    format: Literal["xview", "coco", "yolo", "dota"]
    path: str = Field(description="GeoJSON, COCO JSON, data.yaml, or a folder of DOTA txt files")
    mapping: dict[str | int, str] = Field(
        {}, description="source class name or id to one of `classes`; empty: equal names"
    )
    other_classes: Literal["drop", "reject"] = Field(
        "reject", description="boxes of a known source class that no mapping names: left out on purpose, or rejected"
    )


class Stac(_Section):
    """Scenes given as STAC items; the filters are pystac-client's, for an API and for a file alike."""

    url: str = Field(description="an API (https://...), or a file with an item collection")
    asset: str = Field("visual", description="which of an item's assets is the scene")
    collections: tuple[str, ...] = ()
    bbox: tuple[float, float, float, float] | None = Field(None, description="west, south, east, north in degrees")
    intersects: dict[str, Any] | None = Field(None, description="a GeoJSON geometry in degrees, instead of `bbox`")
    datetime: str | None = Field(
        None, description="a time or an interval: 2024-05, 2024-05-01/2024-06-15, 2024-05-01/.."
    )
    query: dict[str, dict[str, Any]] = Field({}, description="per property what it must be: {eo:cloud_cover: {lt: 20}}")
    max_items: Pixels | None = Field(None, description="no more than this many items")

    @field_validator("datetime", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        """YAML reads 2024-05-10 as a date, and 2024 as a number."""
        return str(value) if isinstance(value, date | int) else value

    @model_validator(mode="after")
    def _is_one_place(self) -> "Stac":
        if self.bbox and self.intersects:
            raise ValueError("give one of tiles.stac.bbox and tiles.stac.intersects")
        if self.bbox and self.bbox[1] > self.bbox[3]:
            raise ValueError("tiles.stac.bbox has its south above its north: give west, south, east, north")
        if "@" in self.url or "?" in self.url:
            raise ValueError(
                "tiles.stac.url has a @ or a ?, which come with secrets, and would be kept: leave them out"
            )
        return self


class Split(_Section):
    """Shares of tiles per split, assigned by group; `validation` is carved from each training set."""

    train_1: Fraction = 0.4
    train_2: Fraction = 0.4
    test: Fraction = 0.2
    validation: Fraction = Field(0.15, description="share of each training set kept for choosing (epoch, threshold)")

    @model_validator(mode="after")
    def _adds_up(self) -> "Split":
        total = self.train_1 + self.train_2 + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train_1 + train_2 + test must be 1, they are {total:g}")
        return self


class Tiles(_Section):
    """How scenes and truth become tiles."""

    scenes: str | None = Field(None, description="a folder of images, a glob, a table, or one image")
    stac: Stac | None = Field(None, description="a STAC catalogue's items instead")
    synthetic: Synthetic | None = None
    truth: TruthSource | None = None
    size_px: Pixels = 640
    overlap_px: Annotated[int, Field(ge=0)] = 0
    min_visible: Fraction = Field(0.3, description="truth boxes cut below this share are ignored, not trained on")
    background: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share that tiles without truth may have in each split; null keeps all (the paper: a third)"
    )
    split: Split | Literal["truth"] = Field(Split(), description="shares, or `truth`: the truth file names each split")
    max_rejected_fraction: Fraction = Field(
        0.05, description="share of truth rows; if more are rejected, the step ends with an error, after doing the rest"
    )
    bands: tuple[Pixels, Pixels, Pixels] = Field((1, 2, 3), description="1-based bands read as red, green, blue")
    stretch: tuple[float, float] | None = Field(
        None, description="raw values mapped to 0 and 255; null: 8 bit as is, 16 bit by each scene's 2-98 percentiles"
    )

    @model_validator(mode="after")
    def _has_scenes(self) -> "Tiles":
        if [self.scenes, self.stac, self.synthetic].count(None) != 2:
            raise ValueError("give one of tiles.scenes (a path), tiles.stac and tiles.synthetic")
        if self.overlap_px >= self.size_px:
            raise ValueError(f"overlap_px={self.overlap_px} must be below size_px={self.size_px}")
        return self


def is_anchor_based(model: str | dict) -> bool:
    """Whether a recipe's model name, or the yaml in a weights file, means yolov5{n,s,m,l,x}-anchor.yaml."""
    return "anchors" in model if isinstance(model, dict) else model.startswith("yolov5") and "-anchor" in model


def default_iou(model: str | dict) -> float:
    """Default NMS IoU of a YOLO, by its name or yaml: that of ultralytics' predict; for a model with anchors that of
    YOLOv5's detect.py, where several anchors and cells respond to one object and more duplicates must go."""
    return 0.45 if is_anchor_based(model) else 0.7


def _checked_view(value: Any) -> Any:
    is_factor = isinstance(value, int | float) and not isinstance(value, bool) and 0.1 < value < 10
    if is_factor or value in ("fliplr", "flipud", "rot90"):
        return value
    raise ValueError(f"{value!r} is no view: give fliplr, flipud, rot90 or a factor above 0.1 and below 10, as 1.5")


View = Annotated[Literal["fliplr", "flipud", "rot90"] | float, BeforeValidator(_checked_view)]


class OpenVocabulary(_Section):
    """An open-vocabulary teacher, and what it looks for: words or example images for each class."""

    model: str = Field(description="an open-vocabulary model for transformers: a folder, or its name on the hub")
    prompts: dict[str, tuple[str, ...]] = Field({}, description="per class, one phrasing or several")
    examples: dict[str, tuple[str, ...]] = Field(
        {}, description="per class, instead of prompts: image files of one object each"
    )
    combine: Literal["mean", "max"] = Field(
        "mean", description="several phrasings or examples of a class: mean of their embeddings, or max of their scores"
    )
    background: tuple[str, ...] = Field(
        (), description="prompts for what is no object: a box that matches one best is dropped"
    )


class Label(_Section):
    """A teacher over tiles. There is one low floor; thresholds later filter what it kept."""

    weights: str | None = Field(
        None,
        description="the teacher: .pt, .safetensors, .onnx, or a transformers model; `experiment` trains its own",
    )
    open_vocabulary: OpenVocabulary | None = Field(None, description="an open-vocabulary teacher instead of `weights`")
    classes: dict[str, str | None] = Field(
        {},
        description="a class of `weights` to one of the recipe's, or null: left out; default: that of the same name",
    )
    augment: tuple[View, ...] = Field(
        (), description="additional views of each tile: fliplr, flipud, rot90, or a factor of the model's input size"
    )
    splits: tuple[str, ...] | None = Field(None, description="splits to label; null: every tile")
    imgsz: Pixels | None = Field(None, description="null: the size the weights were trained at")
    floor: Fraction = 0.01
    iou: Fraction | None = Field(
        None,
        description="NMS: of two boxes of one class above this IoU, the one with the lower score is dropped; null: "
        "0.7, with anchors 0.45, OWL-ViT and OmDet-Turbo 0.5, DETR and RT-DETR 1 (none is dropped)",
    )
    max_det: Annotated[int, Field(gt=0)] = 1000
    engine: Literal["auto", "pytorch", "pytorch_compile", "openvino", "tensorrt"] = Field(
        "auto", description="what runs the teacher; auto: pytorch on CUDA, openvino on a CPU where it is installed"
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        "auto", description="precision of the convolutions; auto: float16 on CUDA, float32 on a CPU"
    )
    max_rejected_fraction: Fraction = Field(
        0.05, description="share of tiles; if more are rejected, the run ends with an error, after doing the rest"
    )

    @model_validator(mode="before")
    @classmethod
    def _is_not_of_0_1(cls, data: Any) -> Any:
        if isinstance(data, dict) and "owlvit" in data:
            raise ValueError("label.owlvit is label.open_vocabulary now, since other models than OWL-ViT take prompts")
        return data

    def nms(self, default_iou: float) -> Nms:
        """Which of a model's boxes are kept."""
        return Nms(self.floor, default_iou if self.iou is None else self.iou, self.max_det)


class Model(_Section):
    """What to train, and how. ``args`` are ultralytics train arguments under their own names."""

    model: str = Field("yolov5n.yaml", description="an ultralytics model yaml")
    weights: str | None = Field(None, description="start from this .safetensors or .pt where names and shapes fit")
    args: dict[str, Any] = Field({}, description="epochs, batch, imgsz, optimizer, lr0, mosaic, close_mosaic, ...")


class Supplement(_Section):
    """Truth beside soft labels: tiles of another set, with the boxes that people drew."""

    split: str | None = Field(
        None,
        description="split of the tiles with truth; null: train_1 or train_2, the one the student does not learn from",
    )
    share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="share of tiles with truth in an epoch, which has as many tiles as there are with soft labels"
    )
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="weight of truth boxes in the loss; others have 1")

    def of(self, split: str) -> str:
        """The split whose truth a student learns beside the soft labels of ``split``."""
        return self.split or {"train_1": "train_2", "train_2": "train_1"}.get(split, "train_1")


class SoftTeacher(_Section):
    """The moving average of the student labels tiles while the student learns (Xu et al., arXiv:2106.09018)."""

    threshold: Fraction = Field(0.5, description="what the average finds above this score is an object")
    burn_in: Fraction = Field(0.2, description="share of the epochs, at the start, that learn the stored labels")


class Soft(_Section):
    """How a student's loss treats unsure labels. With the defaults it treats them like any other: the loss is
    ultralytics' own (YOLOv5's for models with anchors), on boxes above the threshold.

    softlabel.training.soft says what each setting means for a training set, softlabel.detectors.soft_loss for a loss.
    """

    class_targets: Literal["hard", "vector"] = Field(
        "hard", description="what a box's class is learned as: its best class, or its whole class vector"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="temperature of the class vector; below 1 sharpens it"
    )
    weight_power: Annotated[float, Field(ge=0)] = Field(
        0.0, description="a box's losses are weighted by its score to this power; 0: all have weight 1"
    )
    localisation_power: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="a box's box, DFL and angle losses are weighted by its agreement (how well the teacher's "
        "candidates for it overlapped) to this power; 0: all have weight 1",
    )
    ignore_above: Threshold | None = Field(
        None, description="labels between this and the threshold are neither object nor background; null: background"
    )
    ignore_truth: bool = Field(
        False,
        description="truth that evaluation ignores, and anything of a class that a tile was not labelled for, is "
        "neither object nor background",
    )
    background_far: Fraction = Field(
        1.0, description="soft sampling: weight of background far from all labelled boxes (Wu et al.: 0.25)"
    )
    background_doubt: Fraction = Field(
        0.0,
        description="soft sampling: background inside a label below the threshold loses this times its score in weight",
    )
    smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="online label smoothing: share of a class target that the student's own right answers make up"
    )
    supplement: Supplement | None = Field(None, description="truth of another set, learned beside the soft labels")
    soft_teacher: SoftTeacher | None = Field(
        None, description="tiles with soft labels are relabelled during training, by the student's moving average"
    )
    rounds: Annotated[int, Field(ge=1)] = Field(
        1,
        description="self-training: at most this many students in turn, each on labels by the one before, as long as "
        "validation mAP50 rises",
    )

    def of_truth(self) -> "Soft":
        """The part that is about truth alone: for models that are trained on truth alongside the students."""
        return Soft(ignore_truth=self.ignore_truth)

    def of_labels(self) -> "Soft":
        """The part that is about one student of soft labels, and about truth only if it learns some beside them."""
        changed = {"rounds": 1, **({} if self.supplement else {"ignore_truth": False})}
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _has_a_use(self) -> "Soft":
        if self.temperature != 1 and self.class_targets == "hard":
            raise ValueError("temperature is of class vectors: set class_targets to vector")
        if self.soft_teacher and not self.supplement:
            raise ValueError("soft_teacher needs the truth of some tiles: set supplement too")
        return self


HARD = Soft()
"""The unchanged loss, on boxes above the threshold."""


class Train(_Section):
    """Teacher and student; which labels the student of `softlabel train` learns from."""

    teacher: Model = Model()
    student: Model = Model()
    thresholds: tuple[Fraction, ...] = Field(
        (0.3, 0.5), description="the experiment trains a student for each, per training set"
    )
    split: str = Field("train_2", description="for `softlabel train` and `search`: the training set")
    labels: Literal["truth", "soft"] = Field("soft", description="for `softlabel train` alone")
    threshold: Threshold = Field(
        0.3,
        description="for `softlabel train`, `search` and `compare`: labels must exceed it, strictly; one number, "
        "or one for each class",
    )
    store: str | None = Field(
        None,
        description="for `softlabel train` alone: labels to learn from, a label-*, fused-* or subtypes-* folder; null: "
        "those that `label` makes",
    )
    calibration: str | None = Field(
        None, description="what `softlabel calibrate` wrote: soft labels' scores are mapped by it before the threshold"
    )
    soft: Soft = Field(HARD, description="what students make of labels that are unsure")


class Calibrate(_Section):
    """How the teacher's scores are calibrated, for `softlabel calibrate`."""

    split: str = Field("val_1", description="labelled tiles whose truth it is fitted to")
    method: Literal["isotonic", "temperature"] = Field("isotonic", description="what is fitted, per class")


class Evaluate(_Section):
    """Detections against truth."""

    split: str = Field("test", description="for `softlabel evaluate` alone")
    bootstrap: Annotated[int, Field(ge=0)] = Field(1000, description="resamples, by group of test images; 0: none")


class Dimension(_Section):
    """What the search may set one recipe key to: a range, or choices."""

    min: int | float | None = Field(None, description="with max: a range, of whole numbers if both are")
    max: int | float | None = None
    choices: tuple[bool | int | float | str, ...] | None = Field(None, description="these values")

    @model_validator(mode="after")
    def _is_range_or_choices(self) -> "Dimension":
        if (self.choices is None) == (self.min is None) or (self.min is None) != (self.max is None):
            raise ValueError("give min and max, or choices")
        if self.choices is not None and not self.choices:
            raise ValueError("choices is empty")
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"min={self.min:g} must be below max={self.max:g}")
        return self


class Search(_Section):
    """Which values make the best student, by its mAP50 on the validation split."""

    space: dict[str, Dimension] = Field(
        {"train.threshold": Dimension(min=0.05, max=0.95)},
        description="recipe keys under train (train.threshold.CLASS for one class) to the values they may take",
    )
    sampler: Literal["tpe", "gp", "random", "grid"] = Field(
        "gp", description="what chooses the next values: one of Optuna's, or a grid"
    )
    grid_points: Annotated[int, Field(ge=2)] = Field(9, description="values of a range under the grid sampler")
    precision: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="one of the first points is the threshold from which labels are right with this probability"
    )
    trials: Annotated[int, Field(gt=0)] = Field(
        30, description="students to train at most, including repeats with other seeds"
    )
    explore: Annotated[float, Field(gt=0, le=1)] = Field(
        0.6, description="share of the trials and of the time after which the leaders are repeated with other seeds"
    )
    stop_early: bool = Field(True, description="ASHA: students wait until they are among the best at their epoch")
    grace_epochs: Annotated[int, Field(gt=0)] = Field(3, description="epochs that every student trains at least")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3, description="ASHA: one in this many goes on, and waits again after this many times as many epochs"
    )
    subset: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the training tiles, the same ones each time, on which values are tried first"
    )
    seeds: Annotated[int, Field(gt=0)] = Field(
        3, description="students with different seeds per leading value, at least"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="restarts of a student before it is given up")

    @model_validator(mode="after")
    def _is_about_training(self) -> "Search":
        if not self.space:
            raise ValueError("space is empty: name a recipe key, such as train.threshold")
        for key in self.space:
            if key == "train.soft.rounds":
                raise ValueError("space names train.soft.rounds: a search's students are of one round: remove it")
            if not key.startswith(("train.threshold", "train.student.", "train.soft.")):
                raise ValueError(
                    f"space names {key}: it may vary train.threshold, and keys below train.student and train.soft"
                )
        return self


class Compare(_Section):
    """Ways to train students, for `softlabel compare`: each of them and the plain one, over several seeds."""

    methods: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], dict[str, Any]] = Field(
        {},
        description="a name to recipe keys and their values: keys under train, or label.augment (of the teacher)",
    )
    seeds: Annotated[int, Field(gt=0)] = Field(4, description="students of each method and training set")
    splits: tuple[str, ...] = Field(("train_1", "train_2"), min_length=1, description="training sets")
    drop: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the labelled objects to remove at random first, as if the teacher had missed them"
    )

    @model_validator(mode="after")
    def _is_about_training(self) -> "Compare":
        for name, values in self.methods.items():
            if name in ("plain", "truth"):
                raise ValueError(f"methods names {name}, which is compared in any case: remove it")
            for key in values:
                if not key.startswith(("train.threshold", "train.student.", "train.soft.")) and key != "label.augment":
                    raise ValueError(
                        f"{name} names {key}: give train.threshold, label.augment, or keys below train.student and "
                        "train.soft"
                    )
        return self


class Execution(_Section):
    """Where a run computes, and on how much. Not hashed. What is left open about GPUs is filled in from those that are
    there: see ``softlabel.devices``."""

    device: Literal["auto", "cpu"] = Field("auto", description="cpu: no GPU is used, even where there is one")
    actors: Annotated[int, Field(gt=0)] | tuple[int, int] = Field(1, description="labelling actors, or (min, max)")
    cpus_per_actor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="null: 1 with GPUs; without, the actors share all CPUs that the readers leave"
    )
    gpus_per_actor: Annotated[float, Field(ge=0)] = 0
    reader_cpus_per_actor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="CPUs that read ahead of each labelling actor; null: with GPUs all others, without 0.25"
    )
    batch_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="tiles per forward pass when labelling; null: on CUDA found by trying, on a CPU 4"
    )
    stall_minutes: Annotated[float, Field(gt=0)] = Field(
        30, description="labelling ends with an error when no shard (64 tiles) has been finished for this long"
    )
    wait_minutes: Annotated[float, Field(ge=0)] = Field(
        0, description="how long to wait for the autoscaler of a cluster that is too small; 0: refuse at once"
    )
    workers: Annotated[int, Field(gt=0)] = Field(1, description="training workers (DDP ranks)")
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    max_failures: Annotated[int, Field(ge=0)] = Field(
        3, description="restarts of training, or of labelling without a tile gained, before giving up"
    )

    @model_validator(mode="after")
    def _uses_no_gpu(self) -> Self:
        for key in ("gpus_per_actor", "gpus_per_worker"):
            if self.device == "cpu" and getattr(self, key):
                raise ValueError(f"device: cpu uses no GPU, and {key} asks for one: remove either")
        return self


class Recipe(_Section):
    """A whole run."""

    name: str
    seed: int = 0
    classes: tuple[str, ...] = Field(min_length=1)
    tiles: Tiles
    label: Label = Label()
    train: Train = Train()
    calibrate: Calibrate = Calibrate()
    evaluate: Evaluate = Evaluate()
    search: Search = Search()
    compare: Compare = Compare()
    execution: Execution = Execution()

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, name: str) -> str:
        if "/" in name or name in ("", ".", ".."):
            raise ValueError("it names a folder below runs/, so it must not contain a slash, or be empty, . or ..")
        return name

    @model_validator(mode="after")
    def _classes_are_known(self) -> "Recipe":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes named twice: {', '.join(self.classes)}")
        if "all" in self.classes:
            raise ValueError("a class cannot be named `all`: results use that word for all classes together")
        threshold = self.train.threshold
        if isinstance(threshold, dict) and set(threshold) != set(self.classes):
            raise ValueError(f"train.threshold names {', '.join(threshold)}: give each of `classes` one, or one number")
        low = self.train.soft.ignore_above
        if isinstance(low, dict) and set(low) != set(self.classes):
            raise ValueError(
                f"train.soft.ignore_above names {', '.join(low)}: give each of `classes` one, or one number"
            )
        mapping = self.tiles.truth.mapping if self.tiles.truth else {}
        unknown = sorted(set(mapping.values()) - set(self.classes))
        if unknown:
            raise ValueError(f"tiles.truth.mapping names {', '.join(unknown)}, which `classes` does not")
        made = {name for name in self.label.classes.values() if name is not None}
        if unknown := sorted(made - set(self.classes)):
            known = ", ".join(self.classes)
            raise ValueError(f"label.classes maps to {', '.join(unknown)}, not among `classes` ({known})")
        return self
