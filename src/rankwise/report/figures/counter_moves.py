"""What each way of going on from an adapter gained, with its interval.

In: a counter-test record. Out: a figure, or None where no gain is known.
"""

from __future__ import annotations

from rankwise.records import CounterTestRecord
from rankwise.report import words
from rankwise.report.drawing import Figure, Json, Table, axis, drawn, layout, value_axis
from rankwise.report.looks import safe


def draw(record: CounterTestRecord) -> Figure | None:
    """Draw the gains over going on as it is."""
    known = [(m, m.gain, m.gain_interval) for m in record.moves if m.gain is not None and m.gain_interval is not None]
    if not known:
        return None
    places = list(range(len(known)))
    points: Json = {
        "type": "scatter",
        "mode": "markers",
        "x": [drawn(gain) for _, gain, _ in known],
        "y": places,
        "marker": {"color": "@first", "size": 10},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [drawn(high - gain) for _, gain, (_, high) in known],
            "arrayminus": [drawn(gain - low) for _, gain, (low, _) in known],
            "color": "@first",
        },
        "hovertemplate": "%{x:.4f} nats a token<extra></extra>",
    }
    ends = [end for _, _, interval in known for end in interval]
    names = axis("", tickvals=places, ticktext=[safe(m.text) for m, _, _ in known], showgrid=False)
    names |= {"range": [len(known) - 0.4, -0.6], "showline": False, "tickcolor": "@clear"}
    gains = value_axis("gain over going on as it is, nats a token", ends, zeroline=True, zerolinecolor="@line")
    cells = tuple((m.text, words.number(g), f"{words.number(lo)} to {words.number(hi)}") for m, g, (lo, hi) in known)
    return Figure(
        name="counter-moves",
        title="What going on in another way gains",
        alt="Gain of each move over going on as it is, with a 95 % interval.",
        data=(points,),
        layout=layout(140 + 46 * len(known), showlegend=False, xaxis=gains, yaxis=names),
        caption=(
            f"To the right of zero is better. Paired differences over n = {len(record.seeds)} orders of the "
            "batches, with 95 % intervals by Student's t; all ways begin from the same function.",
            f"A gain below {words.number(record.least_gain)} nats a token counts for nothing.",
        ),
        fallback=Table("Gains", ("move", "gain", "95 % interval"), cells, named=True),
    )
