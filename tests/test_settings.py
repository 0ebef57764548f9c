"""What a key may be is said by the constructor that takes it, and checked before it is called."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import pytest

from dino_lite.config import Config, compose, config_dir, get, load, put
from dino_lite.contracts import Loss, Match, Schedule, UserError
from dino_lite.optim.schedules import Constant, Cosine
from dino_lite.planning import checks, groups
from dino_lite.planning.checks import check_values, mixes_images
from dino_lite.planning.groups import Settings
from dino_lite.planning.plan import plan
from dino_lite.settings.kinds import (
    Count,
    Fraction,
    KeywordsOf,
    Must,
    Sizes,
    Value,
    Values,
)
from dino_lite.settings.validate import checked, locate, parameters, validated
from test_conf import EVALUATIONS, facts

CONFIGS = {
    "dino": ["backbone=vit"],
    "convnet": ["backbone=convnet", "optim=lars"],
    "dinov2": ["method=dinov2", "optim=sgd", "data=shapes"],
    "dinov3": ["method=dinov3", "augment=aerial", "data=huggingface"],
    "simdinov2": ["method=simdinov2", "data=files"],
}
# None of them is allowed everywhere; most keys refuse most of them.
CANDIDATES = [
    *("nonsense", True, 0, 1, -1, 1.5, -0.5, 10**9, -(10**9), float("nan"), None),
    *([], [0], [1.0, 0.5], [-1, 2], {"a": 1}),
]


class Leaf(NamedTuple):
    """A key of a configuration, its annotation, and what the numbers of its schedule must be."""

    key: str
    hint: Any
    values: Any


def leaves_of(target: Any, node: Mapping[str, Any], prefix: str = "", values: Any = None) -> Any:
    """Every key below a node that is no node of its own, with the annotation of its constructor."""
    for name, value in node.items():
        hint = parameters(target).hints.get(name, Any)
        if isinstance(value, dict) and "_target_" in value:
            kinds = [m.kind for m in getattr(hint, "__metadata__", ()) if isinstance(m, Values)]
            yield from leaves_of(locate(value["_target_"]), value, f"{prefix}{name}.", *kinds)
        elif isinstance(value, dict) and hasattr(hint, "__annotations__"):
            yield from leaves_of(hint, value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            yield from leaves_of(lambda **keys: None, value, f"{prefix}{name}.")
        elif not name.startswith("_"):
            yield Leaf(f"{prefix}{name}", hint, values)


def allows(hint: Any, value: Any, values: Any = None) -> bool | None:
    """Whether an annotation allows a plain value, told in another way than the package's; None
    where it is about something else.
    """
    if hint == Value:
        return allows(values or float, value)
    if isinstance(hint, type(Count)):
        base = allows(get_args(hint)[0], value)
        musts = [must for must in hint.__metadata__ if isinstance(must, Must)]
        return base and all(must.holds(value) for must in musts)
    if get_origin(hint) in (Union, UnionType):
        told = [allows(each, value) for each in get_args(hint)]
        return None if None in told else any(told)
    if get_origin(hint) is Literal:
        return value is not True and value in get_args(hint)
    if "Sequence" in str(hint):
        (each,) = get_args(hint)
        if not isinstance(value, list):
            return False
        told = [allows(each, v) for v in value]
        return None if None in told else all(told)
    kinds: Any = {bool: bool, int: int, float: int | float, str: str, type(None): type(None)}
    if hint not in kinds:
        return None
    whole = hint is int and isinstance(value, float) and value % 1 == 0
    truth = isinstance(value, bool) and hint is not bool
    finite = not isinstance(value, float) or abs(value) < float("inf")
    return whole or (isinstance(value, kinds[hint]) and not truth and finite)


def refusal(config: Config) -> str:
    """The sentence with which a configuration is refused; "" where it is not."""
    try:
        check_values(config)
    except UserError as error:
        return str(error)
    return ""


@functools.cache
def requests() -> dict[str, Config]:
    """Configurations that have every class of conf/ between them."""
    found = {name: compose("pretrain", words) for name, words in CONFIGS.items()}
    for path in (config_dir() / "data").glob("*.yaml"):
        found[f"data={path.stem}"] = put(found["dino"], "data", load(path))
    found["evaluate"] = compose("evaluate", [f"eval=[{','.join(EVALUATIONS)}]"])
    found["check"] = compose("check", [])
    return found


@pytest.mark.slow
def test_every_value_outside_of_what_its_constructor_says_is_refused_by_key() -> None:
    """Numbers, truth values, choices and lists of every configuration, wherever they stand; and
    what is allowed passes.
    """
    tried: set[str] = set()
    for name, config in requests().items():
        for leaf in leaves_of(Settings, config):
            told = [allows(leaf.hint, value, leaf.values) for value in CANDIDATES]
            if leaf.key in tried or None in told:
                continue
            tried.add(leaf.key)
            top, default = leaf.key.partition(".")[0], get(config, leaf.key)
            for value, allowed in zip(CANDIDATES, told, strict=True):
                said = refusal(put({top: config[top]}, leaf.key, value))
                allowed = allowed or (value is None and default is None)
                assert said.startswith("" if allowed else f"{leaf.key}="), (name, value)
                assert allowed is not bool(said), (leaf.key, value)
                assert "\n" not in said
    assert len(tried) > 200, "the walk has lost its way"
    assert {"method.head.num_prototypes", "method.patch_head.num_prototypes"} <= tried
    assert {"trainer.memory", "eval.knn.ks", "loss.koleo.across_ranks", "seed"} <= tried


def test_every_number_of_a_configuration_has_a_constructor_that_annotates_it() -> None:
    """Nothing is let through because nobody says what it may be."""
    known = {"callbacks", "normalize"}
    for name, config in requests().items():
        for key, hint, _ in leaves_of(Settings, config):
            value = get(config, key)
            if isinstance(value, int | float) and key.partition(".")[0] not in known:
                assert hint is not Any, (name, key)


def test_no_table_by_key_is_left() -> None:
    """A second statement of what a key may be would drift from the first."""
    trees = [ast.parse(Path(str(module.__file__)).read_text()) for module in (checks, groups)]
    tables = [n for t in trees for n in t.body if isinstance(n, ast.Assign | ast.AnnAssign)]
    texts = [n.value for t in tables for n in ast.walk(t) if isinstance(n, ast.Constant)]
    assert not [text for text in texts if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", str(text))]


# ---------------------------------------------------------------------------- classes from outside


class Unannotated:
    """A loss of the user's own, never built here."""

    mixes_images = True

    def __init__(self, reads, weight, size=3):  # type: ignore[no-untyped-def]
        raise AssertionError("nothing is built before the plan")

    def __call__(self, match: Match) -> Any:
        """Nothing."""


def outside(**settings: Any) -> Config:
    """A run with that loss beside DINO's."""
    weight = {"_target_": "dino_lite.optim.schedules.Constant", "value": 1.0}
    node = {"_target_": f"{__name__}.Unannotated", "reads": "cls", "weight": weight, **settings}
    config = compose("pretrain", ["backbone=vit"])
    return put(config, "loss.own", node)


def test_a_class_without_annotations_is_checked_for_unknown_keys_alone() -> None:
    """And is neither built nor called: planning and asking whether images mix do without."""
    assert plan(outside(size="any thing"), facts()).decisions
    assert mixes_images(outside())
    with pytest.raises(UserError, match=r"^loss\.own\.sise: there is no such key; did you mean "):
        check_values(outside(sise=3))
    with pytest.raises(UserError, match=r"^loss\.own\.weight\.value=a: it must be a number\."):
        check_values(
            outside(weight={"_target_": "dino_lite.optim.schedules.Constant", "value": "a"})
        )


@pytest.mark.parametrize("path", ["no_such_package.Loss", f"{__name__}.NoSuchLoss", "nothing"])
def test_what_cannot_be_imported_is_a_sentence(path: str) -> None:
    """Before anything is built."""
    with pytest.raises(UserError, match=rf"^{re.escape(path)} cannot be imported.*PYTHONPATH"):
        check_values(put(compose("pretrain", []), "loss.own", {"_target_": path}))


# ----------------------------------------------------------------------- images that share a batch


@pytest.mark.parametrize(
    ("words", "mixed"),
    [
        (["backbone=vit"], False),
        (["backbone=convnet"], True),
        (["backbone=convnet", "~backbone.norm"], True),  # the constructor's default
        (["backbone=convnet", "backbone.norm=group"], False),
        (["backbone=convnext_tiny"], False),
        (["backbone=vit", "method.head.batch_norm=true"], True),
        (["method=dinov2"], True),
        (["method=dinov2", "~loss.koleo"], False),
        (["method=simdino"], True),
        (["method=simdino", "loss.simdino.gamma=0"], False),
        (["method=simdino", "~loss.simdino.gamma"], True),
        (["method=dinov2", "loss.koleo.weight.value=auto"], True),
    ],
)
def test_losses_heads_and_backbones_say_whether_they_mix_images(
    words: list[str], mixed: bool
) -> None:
    """By their settings, defaults included, before the plan."""
    assert mixes_images(compose("pretrain", words)) is mixed


# -------------------------------------------------------------------------------- kinds of values


def test_whole_numbers_may_be_written_as_powers_of_ten() -> None:
    """1e3 is an int to whoever takes an int; to others numbers stay as they are."""
    words = [
        "backbone=vit",
        "method.head.num_prototypes=1e3",
        "optim.clip=3",
        "trainer.max_steps=2e1",
    ]
    config = plan(compose("pretrain", [*words, "trainer.max_time=null"]), facts()).config
    for key, value in (("method.head.num_prototypes", 1000), ("trainer.max_steps", 20)):
        assert get(config, key) == value
        assert isinstance(get(config, key), int)
    assert get(config, "optim.clip") == 3


def test_auto_is_refused_where_no_plan_follows() -> None:
    """Unless the constructor knows it."""
    with pytest.raises(UserError, match=r"^batch_size=auto: it must be a whole number"):
        check_values(compose("evaluate", ["batch_size=auto"]), auto=False)
    check_values(compose("evaluate", ["eval=[linear]", "image_size=auto"]), auto=False)


class Group(NamedTuple):
    """Settings without a constructor of their own."""

    share: Fraction = 0.5


class Taker:
    """A class with an annotation of every kind."""

    @checked
    def __init__(
        self,
        size: Count,
        ks: Sizes = (1,),
        path: Path | None = None,
        choice: Literal["a", 2] = "a",
        group: Group = Group(),  # noqa: B008
        pair: tuple[int, float] = (1, 1.0),
        rate: Annotated[Schedule, Values(Fraction)] | None = None,
        many: dict[str, Count] | None = None,
    ) -> None:
        self.size, self.ks, self.pair = size, ks, pair


def takes(other: int = 1, **rest: Annotated[Any, KeywordsOf(Taker)]) -> None:
    """Hands its keywords on."""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"size": -1}, "size=-1: it must be a whole number of at least 0."),
        ({"size": None}, "size=null: it must be a whole number of at least 0."),
        ({"ks": 3}, "ks=3: it must be a list of whole numbers of at least 1, not empty."),
        ({"path": 3}, "path=3: it must be a path, or null."),
        ({"choice": "b"}, "choice=b: it must be one of a, 2."),
        ({"group": {"share": 2}}, "group.share=2: it must be a number in [0, 1]."),
        ({"group": {"shore": 2}}, "group.shore: there is no such key; did you mean group.share?"),
        ({"pair": [1]}, "pair=[1]: it must be a list of 2 values."),
        ({"pair": [1, True]}, "pair=[1, true]: it must be a list, each a number."),
        ({"many": {"a": 1.5}}, "many.a=1.5: it must be a whole number of at least 0."),
        ({"sise": 1}, "sise: there is no such key; did you mean size?"),
    ],
)
def test_each_kind_has_its_sentence(settings: dict[str, Any], said: str) -> None:
    """Of a class, and of a function that hands its keywords on to it."""
    for target in (Taker, takes):
        with pytest.raises(UserError) as caught:
            validated(target, settings)
        assert str(caught.value) == said


def test_a_checked_function_refuses_when_it_is_called_and_takes_objects() -> None:
    """By the same annotations, its own name before the key; tuples stay tuples."""
    with pytest.raises(UserError, match=r"^Taker\.size=-1: it must be"):
        Taker(-1)
    with pytest.raises(UserError, match=r"^Taker\.group\.share=3: it must be"):
        Taker(1, group=Group(3))
    assert Taker(2.0, (4, 5.0)).size == 2  # type: ignore[arg-type]
    made = Taker(1, (4, 5), rate=Constant(0.5), path=Path("a"))
    assert made.ks == (4, 5)


def test_numbers_of_a_schedule_are_bounded_by_whoever_takes_it() -> None:
    """And by nobody where it is built by hand."""
    node = {"_target_": "dino_lite.optim.schedules.Cosine", "base": 2.0, "end": 0.0, "warmup": 0.5}
    with pytest.raises(UserError, match=r"^rate\.base=2.0: it must be a number in \[0, 1\]"):
        validated(Taker, {"size": 1, "rate": node})
    assert Cosine(2.0, 0.0).base == 2.0


# ---------------------------------------------------------------------------------- missing keys


class HasDefault(Loss):
    """A loss whose `reads` is its constructor's default."""

    def __init__(self, weight: Schedule, reads: str = "cls") -> None:
        self.reads, self.weight = reads, weight


class HasAttribute(Loss):
    """A loss whose `reads` belongs to its class."""

    reads = "cls"

    def __init__(self, weight: Schedule) -> None:
        self.weight = weight


def nodes(config: Mapping[str, Any], prefix: str = "") -> Any:
    """The dotted key of everything in a configuration: values, and nodes below the top."""
    for name, value in config.items():
        if prefix:
            yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from nodes(value, f"{prefix}{name}.")


def without(config: Config, key: str) -> Config:
    """A copy of a configuration without a key."""
    parent, _, name = key.rpartition(".")
    return put(config, parent, {k: v for k, v in get(config, parent).items() if k != name})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnet", "dinov2"])
def test_a_run_without_a_key_is_planned_or_refused_in_one_sentence(name: str) -> None:
    """Whichever key is missing; a sentence names a key."""
    config, refused = requests()[name], {}
    for key in nodes({k: v for k, v in config.items() if k not in ("choices", "data")}):
        try:
            plan(without(config, key), facts())
        except UserError as error:
            refused[key] = str(error)
    assert {"method.momentum", "method.head", "optim.learning_rate"} <= refused.keys()
    assert not [said for said in refused.values() if "\n" in said]


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("method.momentum", "method.momentum"),
        ("method.head", "method.head"),
        ("method.head.num_prototypes", "method.head.num_prototypes"),
        ("method.head.hidden_dim", ""),
        ("method.momentum.base", "method.momentum.base"),
        ("method._target_", "method._target_"),
        ("backbone._target_", "backbone._target_"),
        ("optim.learning_rate", "optim.learning_rate"),
        ("optim.learning_rate._target_", "optim.learning_rate._target_"),
        ("optim.optimizer._target_", "optim.optimizer._target_"),
        ("trainer.accelerator", "trainer.accelerator"),
        ("loader.batch_size", "loader.batch_size"),
        ("normalize.mean", ""),
        ("loss.dino.reads", "loss.dino.reads"),
        ("trainer.max_time", ""),
        ("trainer.compile", ""),
        ("optim.clip", ""),
    ],
)
def test_a_missing_key_is_named_unless_it_has_a_default(key: str, missing: str) -> None:
    """Before anything reads it. A partial node may lack what its caller passes."""
    said = refusal(without(requests()["dino"], key))
    assert said.startswith(f"{missing}: this key is missing" if missing else "")
    assert bool(said) is bool(missing)


@pytest.mark.parametrize("name", ["normalize", "backbone", "trainer", "callbacks", "preset"])
def test_a_missing_group_is_named(name: str) -> None:
    """Deleted by an override."""
    assert refusal(compose("pretrain", [f"~{name}"])) == (
        f"~{name}: the key {name} is required; omit ~{name}."
    )


def test_missing_keys_of_the_trainer_get_their_defaults() -> None:
    """So that later code may read them."""
    config = check_values(compose("pretrain", ["~trainer.max_time", "~trainer.compile"]))
    assert get(config, "trainer.max_time") is None
    assert get(config, "trainer.compile") is False


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optim.optimizer", None, "=null: it must be a group of keys with a _target_."),
        ("callbacks.online_eval", 3, "=3: it must be a group of keys with a _target_, or null."),
        ("callbacks.online_eval", None, ""),
        ("augment.global_1", None, "=null: it must be a group of keys."),
        ("augment.global_1", 3, "=3: it must be a group of keys."),
        ("loss.x", {"_target_": "dino_lite.losses.koleo.KoLeoLoss"}, ".reads: this key is missing"),
    ],
)
def test_a_group_of_keys_is_not_replaced_by_a_value(key: str, value: Any, said: str) -> None:
    """Null removes a callback."""
    answer = refusal(put(requests()["dino"], key, value))
    assert answer.startswith(f"{key}{said}" if said else "")
    assert bool(answer) is bool(said)


def test_a_target_without_keys_is_said_to_take_none() -> None:
    """Instead of an empty list of choices."""
    config = put(requests()["dino"], "loss.dino._target_", "os.getpid")
    assert refusal(config).endswith("there is no such key; os.getpid takes no keys.")


@pytest.mark.parametrize("name", ["HasDefault", "HasAttribute"])
def test_a_loss_may_name_its_match_in_code(name: str) -> None:
    """By its constructor's default, or by its class."""
    config = requests()["dino"]
    node = {"_target_": f"{__name__}.{name}", "weight": get(config, "loss.dino.weight")}
    assert plan(put(config, "loss", {"own": node}), facts()).decisions


def test_a_loss_that_names_no_match_is_refused() -> None:
    """A function that is no loss."""
    with pytest.raises(UserError, match=r"^loss\.x: os\.getpid does not name the match"):
        plan(put(requests()["dino"], "loss.x", {"_target_": "os.getpid"}), facts())


@pytest.mark.parametrize("command", ["pretrain", "evaluate"])
def test_gpu_is_an_alias_of_cuda(command: str) -> None:
    """It was accepted before values were checked."""
    key = "trainer.accelerator" if command == "pretrain" else "accelerator"
    check_values(compose(command, [f"{key}=gpu"]), auto=command == "pretrain")
