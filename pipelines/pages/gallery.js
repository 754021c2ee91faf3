const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const PAGE = 48;  // cards that are added at a time: thousands at once would be slow
const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
let order = [];  // rows as sorted and filtered
let shown = 0;
let open = -1;  // index into order of what the dialog shows

const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};
const digits = value => value == null ? "–" : Math.abs(value) < 1e4 ? String(Number(value.toPrecision(4))) : Math.round(value).toLocaleString();

// What a row is sorted by: the value of one run, the worst of all, or how much a run has more than the first.
function value(row) {
  const metric = +at("metric").value, of = at("of")?.value ?? "0";
  const values = row.cells.map(cell => cell?.values?.[metric] ?? null);
  if (of === "worst") {
    const known = values.filter(each => each != null);
    if (!known.length) return null;
    return data.metrics[metric].better === "lower" ? Math.max(...known) : Math.min(...known);
  }
  if (of.startsWith("less")) {
    const own = values[+of.slice(4)];
    return own == null || values[0] == null ? null : own - values[0];
  }
  return values[+of];
}

function orders() {
  const better = data.metrics[+at("metric").value]?.better;
  const choices = better === "lower" ? [["down", "worst first"], ["up", "best first"]]
    : better === "higher" ? [["up", "worst first"], ["down", "best first"]]
    : [["down", "highest first"], ["up", "lowest first"]];
  at("order").replaceChildren(...choices.map(([key, words]) => new Option(words, key)), new Option("as generated", "given"));
}

function media(cell, controls) {
  if (!cell) return make("span", {className: "absent", textContent: "none"});
  if (cell.error) return make("span", {className: "absent", textContent: "not readable"});
  const [, height, width] = cell.size;
  const node = make(cell.picture ? "img" : "video");
  node.style.aspectRatio = `${width} / ${height}`;
  if (width < 128) node.className = "small";
  if (!cell.picture) Object.assign(node, {muted: true, loop: true, playsInline: true, preload: "auto", controls});
  else node.alt = "";
  return node;
}

function card(row, index) {
  const metric = +at("metric").value;
  const of = at("of")?.value ?? "0";
  const pieces = row.cells.map((cell, run) => {
    const score = make("b", {textContent: digits(cell?.values?.[metric])});
    const label = make("span", {className: "run", textContent: data.runs.length > 1 ? data.runs[run] : data.metrics[metric].words});
    const wrong = data.metrics.filter((each, index) => each.verdict && cell?.values?.[index] === 0)
      .map(each => make("span", {className: "wrong", textContent: `✗ ${each.verdict}`}));
    const node = media(cell, false);
    node.cell = cell;
    return make("span", {}, node, make("span", {className: "caption"}, score, label, ...wrong));
  });
  const title = make("span", {className: "prompt", textContent: row.prompt || "(no prompt)", title: row.prompt});
  const difference = of.startsWith("less") && value(row) != null ? ` · ${value(row) > 0 ? "+" : ""}${digits(value(row))}` : "";
  const button = make("button", {type: "button", className: "card one"},
    make("span", {className: "pieces"}, ...pieces), title,
    make("span", {className: "soft", textContent: `seed ${row.seed}${difference}`}));
  button.addEventListener("click", () => show(index));
  return button;
}

// A browser decodes few videos at once, so only those in view have a source.
const watch = new IntersectionObserver(entries => entries.forEach(({isIntersecting, target}) => {
  if (isIntersecting && !target.hasAttribute("src")) {
    target.src = target.cell.src;
    if (target.play && !still) target.play().catch(() => {});
  } else if (!isIntersecting && target.hasAttribute("src")) {
    target.removeAttribute("src");
    target.load?.();
  }
}), {rootMargin: "100px"});

function add() {
  const cards = order.slice(shown, shown + PAGE).map((row, index) => card(row, shown + index));
  at("rows").append(...cards);
  cards.forEach(each => each.querySelectorAll("video, img").forEach(node => watch.observe(node)));
  shown += cards.length;
  at("more").textContent = shown < order.length ? `${order.length - shown} more below` : "";
}
// Told anew after each lot, in case the end is still in view then.
const end = new IntersectionObserver(entries => {
  if (!entries[0].isIntersecting || shown >= order.length) return;
  add();
  end.unobserve(at("more"));
  end.observe(at("more"));
}, {rootMargin: "600px"});
end.observe(at("more"));

function draw() {
  const words = at("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const number = id => at(id).value === "" ? null : Number(at(id).value);
  const [least, most, direction] = [number("from"), number("to"), at("order").value];
  const fits = row => {
    const prompt = row.prompt.toLowerCase();
    if (!words.every(word => prompt.includes(word))) return false;
    if (least == null && most == null) return true;
    const own = value(row);
    return own != null && (least == null || own >= least) && (most == null || own <= most);
  };
  order = data.rows.filter(fits);
  if (direction !== "given") {
    const sign = direction === "up" ? 1 : -1;
    const key = new Map(order.map(row => [row, value(row)]));
    // What has no value stands last, whatever the direction.
    order.sort((a, b) => (key.get(a) == null) - (key.get(b) == null) || sign * (key.get(a) - key.get(b)) || 0);
  }
  watch.disconnect();
  at("rows").replaceChildren();
  shown = 0;
  at("count").textContent = order.length === data.rows.length ? `${order.length} shown` : `${order.length} of ${data.rows.length} shown`;
  add();
  if (!order.length) at("more").textContent = "Nothing fits: shorten the words or widen the range.";
}

function show(index) {
  if (index < 0 || index >= order.length) return;
  open = index;
  const row = order[index];
  at("one-title").textContent = row.prompt || "(no prompt)";
  at("one-videos").replaceChildren(...row.cells.map((cell, run) => {
    const node = media(cell, true);
    if (cell?.src) {
      node.src = cell.src;
      if (node.play && !still) node.play().catch(() => {});
    }
    const path = make("code", {textContent: cell?.path ?? ""});
    return make("figure", {}, node, make("figcaption", {},
      ...(data.runs.length > 1 ? [make("b", {textContent: data.runs[run]})] : []), `seed ${row.seed} `, path));
  }));
  const head = make("tr", {}, make("th", {textContent: "metric"}),
    ...data.runs.map(name => make("th", {className: "number", textContent: data.runs.length > 1 ? name : "value"})));
  const lines = data.metrics.map((metric, each) => make("tr", {title: metric.about},
    make("th", {scope: "row", textContent: `${metric.words}, ${metric.unit}`}),
    ...row.cells.map(cell => make("td", {className: "number", textContent: digits(cell?.values?.[each])}))));
  at("one-scores").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines)));
  at("before").disabled = index === 0;
  at("after").disabled = index === order.length - 1;
  if (!at("one").open) at("one").showModal();
}

at("before").addEventListener("click", () => show(open - 1));
at("after").addEventListener("click", () => show(open + 1));
at("close").addEventListener("click", () => at("one").close());
at("one").addEventListener("close", () => {
  at("one-videos").replaceChildren();
  while (shown <= open) add();
  at("rows").children[open]?.focus();
});
at("one").addEventListener("click", event => event.target === at("one") && at("one").close());
at("one").addEventListener("keydown", event => {
  if (event.target.matches("video")) return;  // whose own keys these are
  if (event.key === "ArrowLeft") show(open - 1);
  else if (event.key === "ArrowRight") show(open + 1);
  else if (event.key === " " && !event.target.matches("button")) {
    event.preventDefault();
    at("one-videos").querySelectorAll("video").forEach(video => video.paused ? video.play().catch(() => {}) : video.pause());
  }
});

at("metric").append(...data.metrics.map((metric, index) => new Option(metric.words, index)));
at("of")?.append(new Option("the worst run", "worst"), ...data.runs.map((name, index) => new Option(name, index)),
  ...data.runs.slice(1).map((name, index) => new Option(`${name} less ${data.runs[0]}`, `less${index + 1}`)));
orders();
at("metric").addEventListener("change", () => { orders(); draw(); });
["text", "from", "to"].forEach(id => at(id).addEventListener("input", draw));
["of", "order"].forEach(id => at(id)?.addEventListener("change", draw));
draw();
