"""What to recompute, and when: settings (Sparsity), and what each step does (make_plan), known before the first one.

    dense     everything is computed
    measure   everything; columns are chosen, and the others' contribution is remembered
    refresh   everything; the columns stay
    sparse    the chosen columns alone; what the others contributed is reused (cache.py)
    skip      nothing: the velocity is extrapolated from the last two computed steps

Nothing here computes: a plan is a list of Steps, made of whole numbers.
"""
import math
from dataclasses import dataclass, replace

MODES = ("dense", "measure", "refresh", "sparse", "skip")
DELTAS = ("pooled", "paper", "none")


@dataclass(frozen=True)
class Sparsity:
    """How much to recompute, and when. The models' presets (CONFIGS) set their own values."""
    attn_keep: float = 0.165         # share of columns kept by mass
    attn_random: float = 0.0         # share kept at random
    mlp_keep: float = 0.30           # share of hidden columns recomputed; 0: the MLP stays dense
    full: int | tuple = 10           # all is recomputed at step 1 and every so many till the last but one, or at these
    choose: int = 1                  # every so many of these steps choose columns anew, the others keep them
    skip: tuple = ()                 # compute nothing at these steps, unless they are full
    delta: str = "paper"             # "pooled" | "paper" | "none": no sparse steps, all but skipped are dense
    drift: bool = True               # rests go on as between the last two full steps; False: they stay
    extrapolate: float | None = 0.8  # a skipped step adds so much of the last two computed ones' trend; 0: repeats;
                                     # None: of each token as much as the trend before explains
    dense_layers: int = 2            # the first layers are always dense

    def __post_init__(self):
        """Raises ValueError for a value that is not allowed."""
        def whole(x, low):
            return type(x) is int and x >= low                       # True is no number

        def listed(x, low):
            return isinstance(x, tuple) and all(whole(i, low) for i in x)

        def share(x):
            return type(x) in (int, float) and 0 <= x <= 1

        for name, fits, allowed in (
                *((name, share, "a number from 0 to 1")
                  for name in ("attn_keep", "attn_random", "mlp_keep")),
                ("extrapolate", lambda x: x is None or share(x), "a number from 0 to 1, or None"),
                ("full", lambda x: whole(x, 1) or listed(x, 0), "a whole number from 1, or a tuple like (1, 2, 4)"),
                ("choose", lambda x: whole(x, 1), "a whole number from 1"),
                ("skip", lambda x: listed(x, 1), "a tuple of steps from 1: step 0 has nothing to reuse"),
                ("delta", lambda x: x in DELTAS, f"one of {', '.join(DELTAS)}"),
                ("drift", lambda x: type(x) is bool, "True or False"),
                ("dense_layers", lambda x: whole(x, 0), "a whole number from 0")):
            if not fits(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} is not {allowed}")


@dataclass(frozen=True)
class Step:
    index: int
    mode: str                        # one of MODES
    age: int = 0                     # steps since the last measure or refresh step; 0: there is none, or it is skipped

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is not one of {', '.join(MODES)}")

    @property
    def skip(self):
        return self.mode == "skip"


def fit_steps(sparsity, steps, made_for):
    """A preset, which lists steps of a run of `made_for`, for a run of `steps`: from the first to the last something is
    computed at the same moments, so in half as many steps half as many in a row are skipped. `full` as a number
    stays."""
    def moments(indices, first):
        return {min(max(first, round(i * (steps - 1) / (made_for - 1))), steps - 1) for i in indices}
    full, skip = sparsity.full, sparsity.skip
    if not isinstance(full, int):
        full = tuple(sorted(moments(full, 1)))
    if skip:
        skip = tuple(sorted(set(range(steps)) - moments(set(range(made_for)) - set(skip), 0)))
    return replace(sparsity, full=full, skip=skip)


def all_but(computed, steps=50):
    """The steps to skip so that `computed` of them are left: the first, the last, and between them more near both ends.
    What stands where is decided early, and the last steps have the fine detail. -> tuple"""
    left = [0]
    for i in range(1, computed):
        u = (i / (computed - 1))**1.25                               # from 0 to 1, slowly at first
        u -= 0.4 * math.sin(2 * math.pi * u) / (2 * math.pi)         # and slowly at last
        left.append(min(max(left[-1] + 1, round((steps - 1) * u)), steps - computed + i))    # room for the rest
    return tuple(sorted({*range(steps)} - {*left}))


def make_presets(columns):
    """A model's presets: `columns`, which skips none, and three that skip steps alone, which is closer to dense at the
    same speed (frontiers in results.md). -> {name: Sparsity}, for 50 steps"""
    caching = replace(columns, delta="none")
    return {"columns": columns, "quality": replace(caching, skip=all_but(30)),
            "balanced": replace(caching, skip=all_but(20)), "fast": replace(caching, skip=all_but(12))}


def relative_time(plan, costs):
    """How long a plan takes, as a share of the dense model's time for as many steps. costs: {a step's mode: its time as
    a share of a step of the dense model}; where no step is sparse, a dense one is the dense model's."""
    if all(step.mode != "sparse" for step in plan):
        costs = costs | {"dense": 1.0}
    return sum(costs[step.mode] for step in plan) / len(plan)


def make_plan(steps, sparsity):
    """What each of `steps` steps does, for a sparsity that fits them (fit_steps), or None: dense.
    Pure: same arguments, same plan. -> list[Step]

    full as a number: step 1, and every so many counted back from the last step but one.

    All is dense until the first measure step, which needs what a dense step before it left: the log-sum-exp of
    attention, activations of the MLP. A full step is never skipped. If no sparse step follows it, it is just dense.
    Of the others only every `choose`-th is a measure step, the rest are refresh steps.
    With delta="none" all steps are dense but those to skip."""
    if sparsity is None:
        return [Step(i, "dense") for i in range(steps)]
    full = sparsity.full
    full = {1, *range((steps - 2) % full, steps, full)} if isinstance(full, int) else {*full}
    if sparsity.delta == "none":                                     # no sparse step to prepare
        full = set()
    first = min(full - {0}, default=steps)
    computed = [i for i in range(steps) if i in full or i not in sparsity.skip]
    sparse = {i for i in computed if i > first and i not in full}
    plan, remembered = [Step(i, "skip") for i in range(steps)], []   # and the steps that fill the cache
    for i, following in zip(computed, computed[1:] + [None]):
        age = i - remembered[-1] if remembered else 0
        if i in sparse:
            mode = "sparse"
        elif following not in sparse:
            mode = "dense"
        else:
            mode = "refresh" if len(remembered) % sparsity.choose else "measure"
            remembered.append(i)
        plan[i] = Step(i, mode, age)
    return plan


def until_sparse(plan):
    """The plan's first steps, the first sparse one included: every kernel runs in them."""
    return plan[:1 + next((step.index for step in plan if step.mode == "sparse"), 0)]
