// The colour scale of the selection viewer, and its legend.

/** A colour scale for ascending values, with the extremes (2 %) in the end colours, so that they use none up. */
function colorScale(values, isSigned) {
  const quantile = (share) => values.length ? values[Math.round(share * (values.length - 1))] : 0;
  const round = (value) => Number(value.toPrecision(2));
  if (isSigned) { // zero in the middle
    const high = round(Math.max(-quantile(0.01), quantile(0.99))) || 1;
    return { colors: "change", low: -high, high, values,
      place: (value) => Math.max(0, (value / high + 1) / 2), at: (place) => high * (2 * place - 1) };
  }
  const high = round(quantile(0.98)) || 1;
  const low = quantile(0) >= -1e-3 * Math.abs(high) ? 0 : round(quantile(0.02));
  const isSkewed = low === 0 && quantile(0.5) < 0.3 * high; // most values are small: a root shows them apart
  const power = isSkewed ? 0.5 : 1;
  const width = high - low || 1;
  return { colors: "heat", isSkewed, low, high, values,
    place: (value) => Math.max(0, (value - low) / width) ** power, at: (place) => low + width * place ** (1 / power) };
}

/** The colour of a value: between two of the five that page.css defines for each theme. */
function colorAt(scale, value) {
  if (!isNumber(value)) return "var(--no-value)";
  const place = 4 * Math.max(0, Math.min(1, scale.place(value)));
  const left = Math.min(3, Math.floor(place));
  const [from, to] = [left, left + 1].map((stop) => `var(--${scale.colors}-${stop})`);
  return `color-mix(in srgb, ${to} ${Math.round(100 * (place - left))}%, ${from})`;
}

function drawColorLegend(legend, scale, name, unit) {
  const notes = [unit, scale.isSkewed && "square-root scale"].filter(Boolean).join(", ");
  legend.querySelector(".legend-name").replaceChildren(make("b", {}, name), make("span", {}, notes));
  const colors = [0, 1, 2, 3, 4].map((stop) => `var(--${scale.colors}-${stop})`).join(", ");
  legend.querySelector(".ramp").style.background = `linear-gradient(to right, ${colors})`;
  legend.querySelector(".ticks").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].map((place) => {
    const beyond = place === 1 && scale.values.at(-1) > scale.high ? "≥ "
      : place === 0 && scale.low !== 0 && scale.values[0] < scale.low ? "≤ " : "";
    return make("span", {}, beyond + formatNumber(scale.at(place), 2));
  }));
}
