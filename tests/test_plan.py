"""The plan: pure, complete, overridable, and a sentence for what cannot work."""

from __future__ import annotations

import copy
import functools
import shlex

import pytest
import yaml

from dino_lite.config import Config, compose, config_dir, get, instantiate, leaves, load, put
from dino_lite.contracts import Progress, UserError
from dino_lite.methods.clock import seconds
from dino_lite.planning.plan import plan
from test_conf import facts


@functools.cache
def defaults() -> Config:
    """The configuration of a request without overrides."""
    return compose("pretrain", [])


def planned(*overrides: str, **changes: object) -> Config:
    """The planned configuration of "key=value" on some facts (put in place here: composing takes
    half a second).
    """
    config = defaults()
    for override in overrides:
        key, _, value = override.partition("=")
        config = put(config, key.lstrip("+"), yaml.safe_load(value))
    return plan(config, facts(**changes)).config


def test_same_request_and_facts_give_the_same_plan_and_leave_the_request_alone() -> None:
    """plan is a pure function."""
    config = defaults()
    before = copy.deepcopy(config)
    assert plan(config, facts()) == plan(config, facts())
    assert config == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"height": 32, "width": 32}, {"augment.global_size": 32, "trainer.precision": "32"}),
        (
            {},
            {
                "augment.global_size": 64,
                "backbone.patch_size": 8,
                "augment.local_size": 32,
                "trainer.max_time": "30m",
            },
        ),
        ({"source": "shapes", "height": 32, "width": 32}, {"trainer.max_time": "4m"}),
        (
            {
                "accelerator": "cuda",
                "num_images": 1_281_167,
                "bf16": True,
                "height": 375,
                "width": 500,
            },
            {
                "augment.global_size": 224,
                "augment.local_size": 96,
                "augment.num_local": 8,
                "augment.global_scale": [0.4, 1.0],
                "augment.local_scale": [0.05, 0.4],
                "backbone.patch_size": 16,
                "method.head.num_prototypes": 65_536,
                "method.momentum.base": 0.996,
                "trainer.max_epochs": 100,
                "trainer.max_time": None,
                "trainer.precision": "bf16",
                "backbone.name": "vit_small_patch16_224",
            },
        ),
    ],
)
def test_facts_decide(changes: dict[str, object], expected: dict[str, object]) -> None:
    """Image size, number of images and device settle crops, model, length and precision."""
    config = planned(**changes)
    assert {key: get(config, key) for key in expected} == expected


def test_every_decision_is_told_with_its_reason() -> None:
    """What was auto and is settled appears in the table, and nothing else."""
    config = put(defaults(), "loader.batch_size", 32)
    result = plan(config, facts())
    chosen = load(config_dir() / "backbone" / "convnet.yaml")  # in place of what stood there
    asked = leaves(config | {"backbone": chosen})
    auto = {key for key, value in asked if value == "auto"} - {"name", "data.labels"}
    assert {decision.key for decision in result.decisions} == auto | {"backbone"}
    assert all(decision.reason in result.table() for decision in result.decisions)


def test_given_values_are_kept_and_followed() -> None:
    """A value that was given stays, and what depends on it follows."""
    config = planned(
        "augment.global_size=96",
        "backbone.patch_size=16",
        "loader.batch_size=512",
        "optim.rate=1.0e-3",
    )
    assert config["backbone"]["image_size"] == 96
    assert config["augment"]["local_size"] == 48
    assert get(config, "optim.learning_rate.base") == pytest.approx(2e-3)


def test_on_a_cpu_the_backbone_is_a_convnet_unless_something_is_asked_of_it() -> None:
    """A ViT where any of its keys is given, where patches are masked, on a GPU, for the embedded
    set; the choice is told, and each of its keys can be given in turn.
    """
    convnet, vit = "dino_lite.backbones.convnet.ConvNet", "dino_lite.backbones.vit.ViT"
    told = plan(defaults(), facts())
    assert told.config["backbone"]["_target_"] == convnet
    assert "backbone=convnet" in told.table()
    assert not {"depth", "num_heads", "image_size"} & told.config["backbone"].keys()
    for request, changes in (
        ("backbone.depth=4", {}),
        ("backbone.patch_size=8", {}),
        ("seed=0", {"source": "shapes"}),
        ("seed=0", {"accelerator": "cuda"}),
    ):
        assert planned(request, **changes)["backbone"]["_target_"] == vit, request
    masks = plan(compose("pretrain", ["method=dinov2"]), facts())
    assert masks.config["backbone"]["_target_"] == vit


def test_a_small_convnet_gets_large_crops_and_a_large_one_the_papers() -> None:
    """Fields are as many in local crops as in global ones; stages halve what the stem leaves."""
    small = planned(height=32, width=32)
    wanted = {
        "backbone.patch_size": 4,
        "augment.local_size": 16,
        "augment.global_scale": [0.6, 1.0],
        "augment.local_scale": [0.2, 0.6],
    }
    assert {key: get(small, key) for key in wanted} == wanted
    named = plan(compose("pretrain", ["backbone=resnet50"]), facts(accelerator="cuda")).config
    wanted |= {
        "backbone.patch_size": 32,
        "augment.local_size": 96,
        "augment.global_scale": [0.14, 1.0],
        "augment.local_scale": [0.05, 0.14],
    }
    assert {key: get(named, key) for key in wanted} == wanted


def test_preset_is_the_number_of_images_or_a_word_for_one() -> None:
    """Settings of small and large sets whatever there is; between them on a log scale."""
    keys = ("method.head.num_prototypes", "method.momentum.base", "trainer.max_epochs")

    def settings(*overrides: str, **changes: object) -> list[object]:
        config = planned("trainer.accelerator=cuda", *overrides, accelerator="cuda", **changes)
        return [get(config, key) for key in keys]

    assert settings(num_images=2_000) == settings("preset=tiny") == settings("preset=2000")
    assert settings("preset=tiny") == [512, 0.99, 800]
    assert settings("preset=large") == settings(num_images=1_280_000) == [65_536, 0.996, 100]
    momentum = [settings(f"preset={num}")[1] for num in (20_000, 160_000, 1_280_000)]
    assert momentum == [0.99, 0.993, 0.996]  # 8 times, and 8 times again
    assert planned(num_images=3000)["preset"] == 3000


def test_an_end_left_open_is_the_base() -> None:
    """Rate, decay and momentum then stay where they are, the rate after its warm-up (DINOv3)."""
    keys = ("optim.learning_rate", "optim.weight_decay", "method.momentum")
    config = planned(*(f"{key}.end=auto" for key in keys), "optim.rate=1.0e-3")
    for key in keys:
        schedule = instantiate(get(config, key))
        warm = 10 if key == "optim.learning_rate" else 0
        values = [schedule(Progress(step, 100, 10)) for step in range(100)]
        assert set(values[warm:]) == {get(config, f"{key}.base")}
        assert values[:warm] == sorted(set(values[:warm]))


def test_a_schedule_of_another_kind_is_planned_too() -> None:
    """A rule for a key that it has not settles nothing."""
    constant = {"_target_": "dino_lite.optim.schedules.Constant", "value": 1e-4}
    config = put(put(defaults(), "optim.learning_rate", constant), "method.momentum", constant)
    result = plan(config, facts())
    assert get(result.config, "optim.learning_rate") == constant
    assert not [d for d in result.decisions if d.key.startswith("optim.learning_rate.")]


def test_channels_decide_the_first_convolution_and_the_normalization() -> None:
    """RGB is normalized as ImageNet is, for weights of others fit; any other data by its own."""
    assert planned()["normalize"]["mean"] == [0.485, 0.456, 0.406]
    assert planned()["normalize"]["std"] == [0.229, 0.224, 0.225]
    for channels in (1, 2, 5):
        mean, std = (0.25,) * channels, (0.125,) * channels
        config = planned(channels=channels, mean=mean, std=std)
        assert config["backbone"]["in_chans"] == channels
        assert config["normalize"]["mean"] == list(mean)
        assert config["normalize"]["std"] == list(std)


@pytest.mark.parametrize(
    ("overrides", "size", "expected"),
    [
        ("backbone=vit", 32, "32"),  # 64 wide on the embedded set, 17 tokens
        ("backbone=vit backbone.embed_dim=128", 32, "bf16"),
        ("backbone=vit", 64, "bf16"),
        ("backbone=vit_tiny", 32, "bf16"),
        ("backbone=convnet", 32, "bf16"),
    ],
)
def test_bfloat16_on_a_cpu_only_where_it_pays(overrides: str, size: int, expected: str) -> None:
    """Not for narrow networks on few tokens; on a GPU and without the instructions always alike."""
    config = compose("pretrain", overrides.split())
    source = {"source": "shapes", "height": size, "width": size}

    def precision(**changes: object) -> str:
        return str(get(plan(config, facts(**source, **changes)).config, "trainer.precision"))

    assert precision(bf16=True) == expected
    assert precision(bf16=True, accelerator="cuda") == "bf16"
    assert precision(bf16=False) == "32"


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        ("trainer.max_steps=5000", {}, True),
        ("trainer.max_steps=4999", {}, False),
        ("trainer.max_epochs=100", {}, True),  # of 78 steps each
        ("trainer.max_epochs=10", {}, False),
        ("trainer.max_time=1h", {}, True),
        ("trainer.max_time=59m", {}, False),
        ("trainer.max_steps=5000", {"compiler": False}, False),
        ("trainer.max_steps=5000 trainer.precision=32", {}, False),
        ("trainer.max_steps=5000 trainer.precision=32", {"accelerator": "cuda"}, True),
        ("trainer.max_steps=5000 backbone=convnet", {}, False),
    ],
)
def test_a_run_is_compiled_where_it_is_long_enough(
    overrides: str, changes: dict[str, object], expected: bool
) -> None:
    """By steps or by the clock; a CPU in bfloat16 only; only transformers have what is compiled."""
    config = compose("pretrain", ["backbone=vit", "loader.batch_size=64", *overrides.split()])
    known = facts(**({"compiler": True, "bf16": True} | changes))
    assert get(plan(config, known).config, "trainer.compile") is expected


LARGE = ("augment.global_size=224", "augment.local_size=96", "augment.num_local=8")


@pytest.mark.parametrize(
    ("overrides", "changes", "expected"),
    [
        (["backbone=vit"], {"source": "shapes", "height": 32, "width": 32}, 0),
        (["backbone=vit"], {}, 0),
        (["backbone=vit", "loader.batch_size=128"], {}, 64),
        (["backbone=vit", "loader.batch_size=128", "trainer.devices=2"], {}, 0),
        (["backbone=vit_tiny", *LARGE], {}, 5),
        (["backbone=vit_tiny", *LARGE], {"bf16": True}, 7),
        (["backbone=vit_tiny", *LARGE], {"accelerator": "cuda"}, 0),
        (["backbone=resnet50", *LARGE], {}, 0),
        (["backbone=vit_tiny", *LARGE, "method=dinov2"], {}, 0),  # KoLeo
    ],
)
def test_a_cpu_takes_a_large_batch_in_parts(
    overrides: list[str], changes: dict[str, object], expected: int
) -> None:
    """By what the backward pass would keep; whole where images are looked at together, in
    convolutional networks and on a GPU.
    """
    config = plan(compose("pretrain", overrides), facts(**changes)).config
    assert get(config, "trainer.micro_batch_size") == expected


def test_batch_size_divides_by_the_processes() -> None:
    """loader.batch_size counts images over all processes."""
    assert planned("trainer.devices=3")["loader"]["batch_size"] % 3 == 0


REFUSED = {
    "preset=huge": "one of tiny, small, medium, large, or a number of images",
    "preset=0": "one of tiny",
    "augment.global_size=0": "augment.global_size=0",
    "augment.num_local=-1": "a whole number of at least 0",
    "backbone.patch_size=128": "128 pixels: set augment.global_size=128 or another multiple of",
    "augment.global_size=60 backbone.patch_size=8": "augment.global_size=64 or another multiple of",
    "loader.batch_size=0": "loader.batch_size=0",
    "loader.batch_size=7 trainer.devices=2": "must be divisible",
    "loader.num_workers=-1": "a whole number of at least 0",
    "method.teacher_temp.end=-0.04": "a number above 0",
    "loss.dino.student_temp=0": "a number above 0",
    "method.momentum.base=1.5": "a number in [0, 1]",
    "augment.global_1.flip_prob=2": "a number in [0, 1]",
    "optim.clip=-1": "a number of at least 0",
    "optim.learning_rate.warmup=1.5": "a fraction of the run",
    "trainer.max_epochs=5 'optim.learning_rate.warmup=10 epochs'": "longer than the run",
    "trainer.max_steps=5 'optim.learning_rate.warmup=10 steps'": "longer than the run",
    "trainer.max_time=5m 'optim.freeze_last_layer=1 epochs'": "must be a fraction of the run",
    "trainer.max_epochs=5 optim.learning_rate.warmup=20epochs": "longer than the run",
    "trainer.max_epochs=5 'optim.learning_rate.warmup=20 EP'": "longer than the run",
    "trainer.max_time=1.2.3h": "a positive time",
    "backbone.num_heads=0": "a whole number",
    "backbone.patch_size=0": "a whole number",
    "method.head.num_layers=0": "a whole number",
    "trainer.max_epochs=5 trainer.max_steps=5": "exactly one",
    "trainer.max_epochs=0": "a number above 0, or null",
    "trainer.max_epochs=null trainer.max_time=null": "The length of the run is not set",
    "loader.batch_size=abc": "a whole number",
    "data.channels=n": "a whole number",
    "data.channels=0": "a whole number",
    "loader.num_workers=1.5": "a whole number",
    "trainer.devices=two": "a whole number",
    "seed=abc": "a whole number",
    "trainer.max_steps=1.5": "a whole number",
    "trainer.micro_batch_size=1.5": "a whole number",
    "trainer.num_threads=0": "a whole number",
    "method.head.num_prototypes=null": "a whole number",
    "optim.max_skipped=0": "a whole number",
    "optim.rate=abc": "a number of at least 0",
    "optim.clip=abc": "a number of at least 0",
    "loader.max_bad_fraction=abc": "a number in [0, 1]",
    "optim.clip_by=foo": "one of global, module, parameter",
    "optim.freeze_by=foo": "one of gradient, rate",
    "optim.layer_decay=0": "a number above 0 and at most 1",
    "optim.layer_decay=1.1": "a number above 0 and at most 1",
    "optim.patch_embed_scale=-1": "a number of at least 0",
    "optim.rate_rule=foo": "one of linear",
    "backbone.drop_path_by=foo": "one of sample, batch",
    "backbone.num_registers=-1": "a whole number of at least 0, or null",
    "augment.gram_size=100": "the network reduces images by 8 pixels: set augment.gram_size=104 or",
    "method.teacher_temp.per=foo": "one of step, epoch",
    "baselines=maybe": "true or false",
    "backbone.in_chans=1": "the images have 3 channels",
    "backbone.in_chans=0": "a whole number of at least 1",
    "normalize.mean=[0.5]": "a list of 3 numbers",
    "normalize.std=0.5": "a list of numbers above 0",
    "normalize.std=[0.1,0.1,a]": "a list of numbers above 0",
    "trainer.max_steps=2 'optim.learning_rate.warmup=10 epochs'": "longer than the run",
    "trainer.max_time=soon": "a positive time",
    "trainer.precision=16": "fp16",
    "trainer.compile=true": "finds no C",
    "trainer.precision=8": "32, bf16 or 64",
    "+trainer.max_epoch=3": "no such key; did you mean trainer.max_epochs?",
    "+loss.dino.student_tmp=3": "no such key; did you mean loss.dino.student_temp?",
    "loss.dino.student_temp=auto": "no automatic value",
    "loss.dino.weight=1": "a group of keys with a _target_",
    "method.momentum=0.9": "a group of keys with a _target_",
    "optim.optimizer.betas=[0.9]": "a list of 2",
    "seed=true": "a whole number",
    "method.head.batch_norm=1": "true or false",
}


@pytest.mark.parametrize("request_", REFUSED)
def test_impossible_values_are_refused_in_a_sentence(request_: str) -> None:
    """Each impossible value names its key and the reason."""
    with pytest.raises(UserError) as caught:
        planned(
            *[
                part.replace("=", "='", 1) + "'" if " " in part else part
                for part in shlex.split(request_)
            ]
        )
    assert REFUSED[request_] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["backbone=resnet50", "backbone=vit_small"])
def test_crops_smaller_than_a_patch_are_refused_by_what_was_given(words: str) -> None:
    """The size of the crops, not the patch size that comes with the network."""
    given = [words, "backbone.patch_size=32", "augment.global_size=96", "augment.local_size=16"]
    does = "reduces images by" if words == "backbone=resnet50" else "has patches of"
    with pytest.raises(UserError, match=rf"^augment\.local_size=16: the network {does} 32 "):
        plan(compose("pretrain", given), facts())


@pytest.mark.parametrize(
    ("text", "value"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1d", 86400), ("1.5h", 5400), (10, 600)],
)
def test_times_are_read(text: str, value: float) -> None:
    """Seconds, minutes, hours, days; a bare number is minutes."""
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss=[]"], "choose loss="),
        (["method=simdino", "~loss.simdino"], "choose loss="),
        (["method=dinov2", "~loss.ibot"], "no loss reads masked patches"),
        (["method=dinov2", "loss=[simdino,patch]"], "no loss reads its prototypes"),
        (["method=dino", "loss=[simdino]"], "no loss reads its prototypes"),
        (["method=dinov2", "method.patch_head.batch_norm=true"], "a single one has no variance"),
        (
            ["method=dinov2", "method.patch_head=null", "method.head.batch_norm=true"],
            r"method\.head\.batch_norm=true: the number of masked patches",
        ),
        (["backbone.mask_token=true"], "the method masks no patches"),
        (["method=dinov3", "method.gram.start_step=5"], "a fraction of the run"),
        (["method=dinov3", "method.gram.start_step=9 steps"], "longer than the run"),
    ],
)
def test_what_no_loss_reads_or_never_begins_is_refused(words: list[str], said: str) -> None:
    """Before the run, in a sentence: several processes would wait for its gradient."""
    config = compose("pretrain", ["trainer.max_steps=5", "trainer.max_time=null", *words])
    with pytest.raises(UserError, match=said):
        plan(config, facts())


def test_one_head_for_class_tokens_and_patches_is_read_by_either() -> None:
    """Its prototypes are the patches' too."""
    words = ["method=dinov2", "method.patch_head=null", "~loss.dino", "trainer.max_steps=5"]
    assert plan(compose("pretrain", [*words, "trainer.max_time=null"]), facts()).decisions
