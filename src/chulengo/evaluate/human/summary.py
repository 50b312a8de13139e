"""Everything that the ratings say, as one JSON-able dictionary, and as a short table in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from chulengo.data.wording import counted
from chulengo.evaluate.human.agreement import choice_agreement
from chulengo.evaluate.human.bradley_terry import bradley_terry
from chulengo.evaluate.human.criteria import criterion, criterion_names
from chulengo.evaluate.human.raters import position_bias, rater_counts, self_consistency
from chulengo.evaluate.human.ratings import Collected
from chulengo.evaluate.human.win_rate import compared_pairs, votes, win_rate

FORMAT = "chulengo-ratings/1"


def summarise(collected: Collected, *, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """Returns the statistics of all ratings.

    Args:
        collected: what `read_ratings` returned.
        draws: bootstrap draws of every interval that has them.
        seed: of the draws.
    """
    # sorted, so that the order of the files changes nothing
    ratings = sorted(collected.ratings, key=lambda rating: rating.place)
    systems = _systems(collected)
    cast = votes(ratings)
    result: dict[str, Any] = {
        "format": FORMAT, "outputs": collected.outputs, "systems": systems,
        "counts": {
            "rows": collected.num_rows, "ratings": len(ratings), "blank": collected.num_blank,
            "twice": collected.num_twice, "missing": sum(collected.num_missing.values()), "votes": len(cast),
            "items": len({rating.item for rating in ratings}),
            "equal_pairs_not_shown": collected.study.num_equal_pairs if collected.study else 0,
        },
        "raters": rater_counts(ratings, collected.num_missing),
    }
    if cast:
        result["win_rates"] = [win_rate(ratings, one, other) for one, other in compared_pairs(ratings, systems)]
        result["bradley_terry"] = bradley_terry(ratings, systems, draws=draws, seed=seed)
        result["position_bias"] = position_bias(ratings, sides_by_coin=collected.study is not None)
        result["agreement"] = [
            alpha.to_dict() for alpha in choice_agreement(ratings, systems, draws=draws, seed=seed)
        ]
    if cast or any(rating.showing == 2 for rating in ratings):
        result["self_consistency"] = self_consistency(ratings)
    names = criterion_names(ratings)
    if names:
        result["criteria"] = [criterion(ratings, name, systems, draws=draws, seed=seed) for name in names]
    return result


def _systems(collected: Collected) -> list[str]:
    found = {name for rating in collected.ratings for name in (rating.left, rating.right) if name}
    first = list(collected.study.systems) if collected.study else []
    # as in results: the win rate is the tuned model's
    return [*first, *sorted(found - set(first), key=lambda name: (name != "tuned", name))]


def table(summary: Mapping[str, Any]) -> str:
    """Returns the statistics as a short text."""
    return "\n".join([
        *_counts(summary), *_win_rates(summary), *_strengths(summary), *_criteria(summary), *_trust(summary),
        *_raters(summary),
    ])


def _counts(summary: Mapping[str, Any]) -> Iterator[str]:
    counts = summary["counts"]
    ratings, items = counted(counts["ratings"], "rating"), counted(counts["items"], "item")
    people = counted(sum(row["rated"] > 0 for row in summary["raters"].values()), "person", "people")
    votes_said = "1 of them a vote" if counts["votes"] == 1 else f"{counts['votes']} of them votes"
    yield f"{ratings} of {items} by {people}, {votes_said}"
    notes = {"missing": ("row", "not rated yet"), "twice": ("rating", "given twice, counted once"),
             "equal_pairs_not_shown": ("pair", "with equal answers, not shown and not counted")}
    yield from (f"  {counted(counts[name], noun)} {what}" for name, (noun, what) in notes.items() if counts[name])


def _win_rates(summary: Mapping[str, Any]) -> Iterator[str]:
    for rate in summary.get("win_rates", []):
        yield ""
        yield (f"{rate['system']} against {rate['against']}: {rate['wins']} won, {rate['losses']} lost, "
               f"{counted(rate['ties'], 'tie')}, {rate['both_bad']} both bad")
        for name, label in (("ties_half", "win rate, ties as half"), ("ties_excluded", "win rate, ties left out")):
            yield f"  {label:<26}{_share(rate[name])}" + _over(rate[name]["n"])
        yield f"  {'so far':<26}{_verdict(rate)}"
        needed = rate["still_needed"]
        yield f"  {'decisive votes needed':<26}{', '.join(_needed(row) for row in needed['rows'])}"


def _verdict(rate: Mapping[str, Any]) -> str:
    low, high = rate["ties_half"]["interval_95"]
    if low > 0.5:
        return f"{rate['system']} is preferred"
    if high < 0.5:
        return f"{rate['against']} is preferred"
    return "undecided: the interval holds 50 %"


def _needed(row: Mapping[str, Any]) -> str:
    name = row["if_true_share"]
    if name == "as seen" and row["share"] is not None:
        name = f"{100 * row['share']:.0f}:{100 * (1 - row['share']):.0f} as seen"
    if row["needed"] is None:
        return f"{name} cannot be told from one half"
    more = f"{row['more']} more" if row["more"] else "reached"
    return f"{row['needed']} if {name} ({more})"


def _strengths(summary: Mapping[str, Any]) -> Iterator[str]:
    result = summary.get("bradley_terry")
    if result is None:
        return
    yield ""
    yield "Bradley–Terry strength (log-odds; 0 is the average)"
    for row in sorted(result["strengths"], key=lambda row: -row["strength"]):
        interval = f" [{row['interval_95'][0]:+.2f}, {row['interval_95'][1]:+.2f}]" if row["interval_95"] else ""
        yield f"  {row['system']:<26}{row['strength']:+.2f}{interval}"
    if result["reason"]:
        yield f"  no interval: {result['reason']}"


def _criteria(summary: Mapping[str, Any]) -> Iterator[str]:
    for result in summary.get("criteria", []):
        yield ""
        yield f"{result['name']}, 1 to 5"
        for row in result["systems"]:
            yield f"  {row['system']:<26}{_mean(row)}"
        for row in result["differences"]:
            yield f"  {row['system'] + ' - ' + row['minus']:<26}{_mean(row, '+')}"
        yield f"  {'agreement':<26}{_alpha(result['agreement'])}"


def _mean(row: Mapping[str, Any], sign: str = "") -> str:
    if row["mean"] is None:
        return "nothing rated"
    interval = f" [{row['interval_95'][0]:{sign}.2f}, {row['interval_95'][1]:{sign}.2f}]" if row["interval_95"] else ""
    return f"{row['mean']:{sign}.2f}{interval}{_over(row['num_items'])}"


def _over(num_items: int) -> str:
    return f" over {counted(num_items, 'item')}" if num_items else ""


def _trust(summary: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield "Can the ratings be trusted?"
    bias = summary.get("position_bias")
    if bias is not None:
        yield f"  {'left side chosen':<26}{_bias(bias)}"
    for alpha in summary.get("agreement", []):
        yield f"  {'agreement, ' + alpha['level']:<26}{_alpha(alpha)}"
    consistency = summary.get("self_consistency", {})
    if consistency.get("n"):
        yield (f"  {'same choice when repeated':<26}{_share(consistency)}, {consistency['same']} of "
               f"{consistency['n']}; {consistency['changed_system']} chose the same side for another system")
    else:
        yield f"  {'same choice when repeated':<26}not known: no repeat was rated"
    for name, row in consistency.get("scores", {}).items():
        yield (f"  {name + ' repeated':<26}{row['same']} of {row['n']} the same, off by "
               f"{row['mean_difference']:.2f} on average")


def _bias(bias: Mapping[str, Any]) -> str:
    if bias["reason"]:
        return f"not tested: {bias['reason']}"
    if not bias["n"]:
        return "not tested: no decisive votes"
    verdict = "a liking for one side" if bias["p_value"] < 0.05 else "no sign of a liking for one side"
    suspects = [rater for rater, row in bias["by_rater"].items()
                if row["p_value"] is not None and row["p_value"] < 0.05 / len(bias["by_rater"])]
    named = f" ({', '.join(suspects)})" if suspects else ""
    return f"{_share(bias)} of {counted(bias['n'], 'vote')}, p = {bias['p_value']:.2g}: {verdict}{named}"


def _alpha(alpha: Mapping[str, Any]) -> str:
    if alpha["value"] is None:
        return f"alpha not computed: {alpha['reason']}"
    interval = ""
    if alpha["interval_95"]:
        interval = f" [{alpha['interval_95'][0]:.2f}, {alpha['interval_95'][1]:.2f}]"
    return (f"alpha {alpha['value']:.2f}{interval} over {counted(alpha['num_units'], 'unit')}; "
            f"{100 * alpha['equal_pairs']:.0f} % of pairs equal")


def _share(row: Mapping[str, Any]) -> str:
    value = row.get("value", row.get("share"))
    if value is None:
        return str(row.get("reason") or "none")
    low, high = row["interval_95"]
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _raters(summary: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    with_sheets = any("missing" in row for row in summary["raters"].values())
    names = ["rated", *(["missing"] if with_sheets else []), "left", "right", "tie", "both_bad"]
    width = max(len("rater"), *map(len, summary["raters"]))
    bias = summary.get("position_bias", {}).get("by_rater", {})
    repeats = summary.get("self_consistency", {}).get("by_rater", {})
    yield "  ".join([f"  {'rater':<{width}}", *(f"{name.replace('_', ' '):>8}" for name in names), "side p", "repeats"])
    for rater, row in summary["raters"].items():
        p_value = bias.get(rater, {}).get("p_value")
        own = repeats.get(rater)
        yield "  ".join([
            f"  {rater:<{width}}", *(f"{row.get(name, ''):>8}" for name in names),
            f"{'':>6}" if p_value is None else f"{p_value:>6.2g}",
            f"{own['same']} of {own['n']}" if own else "",
        ]).rstrip()
