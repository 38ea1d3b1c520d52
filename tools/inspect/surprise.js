// Colours the text by what is chosen, and shows a token's values beside the pointer. Values come as bytes: 0 is 0 (or
// not a number), 1..255 go from `low` to `high` by equal factors.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const text = document.getElementById("text");
const tokens = Array.from(text.querySelectorAll("i"));
const bytes = new Map();
for (const quantity of data.quantities) {
  bytes.set(quantity, Uint8Array.from(atob(quantity.values), (character) => character.charCodeAt(0)));
}

function value(quantity, layer, token) {
  const row = quantity.layers === 1 ? 0 : layer;
  const byte = bytes.get(quantity)[row * tokens.length + token];
  return byte === 0 ? 0 : quantity.low * Math.pow(quantity.high / quantity.low, (byte - 1) / 254);
}

function chosen() {
  const number = (id) => Number(document.getElementById(id).value);
  return [number("quantity"), number("layer")];
}

// Linear between the 2nd and the 98th percentile, in `data.shades` steps, as in the page's first colours.
function paint() {
  const [which, layer] = chosen();
  if (which === data.quantities.length) {
    tokens.forEach((token, index) => { token.className = data.influence.classes[index]; });
    return;
  }
  const quantity = data.quantities[which];
  const values = tokens.map((_, index) => value(quantity, layer, index));
  const sorted = values.slice(1).sort((a, b) => a - b);
  const at = (share) => sorted[Math.round(share * (sorted.length - 1))];
  const low = at(0.02), high = at(0.98);
  tokens.forEach((token, index) => {
    const share = high > low ? Math.min(1, Math.max(0, (values[index] - low) / (high - low))) : 0;
    token.className = "c" + Math.round(share * (data.shades - 1));
  });
}

const tip = document.getElementById("tip");
function show(event) {
  const index = tokens.indexOf(event.target);
  if (index < 0) {
    tip.hidden = true;
    return;
  }
  const [, layer] = chosen();
  const lines = ["token " + index + "  " + JSON.stringify(event.target.textContent)];
  for (const quantity of data.quantities) {
    const where = quantity.layers === 1 ? "" : "  (" + data.layers[layer] + ")";
    lines.push(quantity.title + "  " + value(quantity, layer, index).toPrecision(3) + where);
  }
  if (data.influence) {
    lines.push("influence on the answer  " + (data.influence.nats[index] ?? "not measured"));
  }
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  tip.style.left = Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(event.clientY + 16, window.innerHeight - tip.offsetHeight - 8) + "px";
}

text.addEventListener("mousemove", show);
text.addEventListener("mouseleave", () => { tip.hidden = true; });
for (const id of ["quantity", "layer"]) {
  document.getElementById(id).addEventListener("change", paint);
}
document.getElementById("controls").hidden = false;
