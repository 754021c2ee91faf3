const data = JSON.parse(document.getElementById("data").textContent);
const at = id => document.getElementById(id);
const PAGE = 25;  // rows that are shown at a time
let order = [];  // rows as sorted and filtered
let first = 0;  // of these, the first that is shown

const make = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};
const keyOf = row => row[1] && `${data.sources[row[0]][1]}:${row[1]}`;

// What a person decides, by key: kept in the browser too, so that a page that is opened again has it.
const place = `lumos-decisions-${data.snapshot}`;
const decisions = new Map();
for (const row of data.rows) {
  if (row[6] != null && keyOf(row)) decisions.set(keyOf(row), {decision: data.statuses[row[2]] === "kept" ? "keep" : "reject", note: row[6]});
}
const given = decisions.size;
try {
  for (const [key, value] of JSON.parse(localStorage.getItem(place) ?? "[]")) decisions.set(key, value);
} catch { /* without storage, decisions last as long as the page */ }

function decide(key, decision) {
  if (decisions.get(key)?.decision === decision) decisions.delete(key);
  else decisions.set(key, {decision, note: decisions.get(key)?.note ?? ""});
  store();
  document.querySelectorAll(".decide").forEach(each => each.dataset.key === key && fill(each));
}
function store() {
  try { localStorage.setItem(place, JSON.stringify([...decisions])); } catch { /* as above */ }
  at("decisions").hidden = !decisions.size;
  at("decided").textContent = decisions.size === 1 ? "1 decision" : `${decisions.size} decisions`;
}
// The two buttons of a clip, and where one is pressed the field for a note.
function fill(node) {
  const own = decisions.get(node.dataset.key);
  const buttons = ["keep", "reject"].map(decision => {
    const button = make("button", {type: "button", textContent: decision, className: decision});
    button.setAttribute("aria-pressed", String(own?.decision === decision));
    button.addEventListener("click", () => decide(node.dataset.key, decision));
    return button;
  });
  node.replaceChildren(...buttons);
  if (own) {
    const note = make("input", {value: own.note, placeholder: "note", ariaLabel: "note"});
    note.addEventListener("input", () => { own.note = note.value; store(); });
    node.append(note);
  }
}
const shorten = (text, length) => text.length <= length ? text : `${text.slice(0, length / 2)}…${text.slice(1 - length / 2)}`;
const quoted = text => /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
at("download").addEventListener("click", () => {
  const lines = [["key", "decision", "note"], ...[...decisions].map(([key, {decision, note}]) => [key, decision, note])];
  const text = lines.map(line => line.map(quoted).join(",") + "\r\n").join("");
  const link = make("a", {href: URL.createObjectURL(new Blob([text], {type: "text/csv"})), download: "overrides.csv"});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
at("forget").addEventListener("click", () => {
  decisions.clear();
  store();
  document.querySelectorAll(".decide").forEach(fill);
});

function value(row) {
  const which = at("score").value;
  return which === "" ? null : row[5][+which];
}
function draw() {
  const words = at("text").value.toLowerCase().split(/\s+/).filter(Boolean);
  const number = id => at(id).value === "" ? null : Number(at(id).value);
  const [least, most, status, direction] = [number("from"), number("to"), at("status").value, at("order").value];
  order = data.rows.filter(row => {
    if (status === "decided" ? !decisions.has(keyOf(row)) : status !== "" && row[2] !== +status) return false;
    const text = `${data.sources[row[0]][0]} ${row[3]} ${keyOf(row)}`.toLowerCase();
    if (!words.every(word => text.includes(word))) return false;
    if (least == null && most == null) return true;
    const own = value(row);
    return own != null && (least == null || own >= least) && (most == null || own <= most);
  });
  if (direction !== "given" && at("score").value !== "") {
    const sign = direction === "up" ? 1 : -1;
    // What has no value stands last, whatever the direction.
    order.sort((a, b) => (value(a) == null) - (value(b) == null) || sign * (value(a) - value(b)) || 0);
  }
  first = 0;
  page();
}
function page() {
  const score = at("score").value === "" ? null : data.scores[+at("score").value];
  at("scored").textContent = score ? score.name : "";
  at("scored").title = score ? `${score.about}, ${score.unit}` : "";
  const lines = order.slice(first, first + PAGE).map(row => {
    const tools = make("div", {className: "decide"});
    if (keyOf(row)) { tools.dataset.key = keyOf(row); fill(tools); }
    const number = make("td", {className: "number", textContent: score ? value(row) ?? "–" : ""});
    if (score) number.dataset.score = score.name;
    return make("tr", {},
      make("th", {scope: "row", className: "name", textContent: shorten(data.sources[row[0]][0], 90), title: `${data.sources[row[0]][0]}\n${keyOf(row)}`}),
      make("td", {className: "short", textContent: row[4] ? (row[4][0] === row[4][1] ? "image" : `${row[4][0].toFixed(1)} to ${row[4][1].toFixed(1)} s`) : ""}),
      make("td", {className: "short", textContent: data.statuses[row[2]]}),
      make("td", {className: "words", textContent: row[3]}),
      number,
      make("td", {}, tools));
  });
  at("rows").replaceChildren(...lines);
  const last = Math.min(first + PAGE, order.length);
  at("count").textContent = order.length ? `${(first + 1).toLocaleString()} to ${last.toLocaleString()} of ${order.length.toLocaleString()}` : "Nothing fits: shorten the words or widen the range.";
  at("before").disabled = first === 0;
  at("after").disabled = last === order.length;
}
at("before").addEventListener("click", () => { first = Math.max(0, first - PAGE); page(); });
at("after").addEventListener("click", () => { first += PAGE; page(); });

at("status").append(new Option("any", ""), ...data.statuses.map((name, index) => new Option(name, index)), new Option("decided by hand", "decided"));
at("score").append(new Option("none", ""), ...data.scores.map(({name}, index) => new Option(name, index)));
at("order").append(new Option("by path and time", "given"), new Option("lowest first", "up"), new Option("highest first", "down"));
at("score").addEventListener("change", () => { if (at("order").value === "given" && at("score").value !== "") at("order").value = "up"; draw(); });
["text", "from", "to"].forEach(id => at(id).addEventListener("input", draw));
["status", "order"].forEach(id => at(id).addEventListener("change", draw));
document.querySelectorAll(".contact .decide").forEach(fill);
// Frames of kept clips move while a pointer is over them, or from one tap to the next.
document.querySelectorAll(".strips:has(.preview)").forEach(strips => {
  const video = strips.querySelector(".preview");
  const move = on => {
    strips.classList.toggle("moving", on);
    if (on) video.play().catch(() => {}); else video.pause();
  };
  strips.tabIndex = 0;
  strips.addEventListener("pointerenter", event => event.pointerType === "mouse" && move(true));
  strips.addEventListener("pointerleave", event => event.pointerType === "mouse" && move(false));
  strips.addEventListener("click", event => event.pointerType !== "mouse" && move(video.paused));
  strips.addEventListener("keydown", event => {
    if (event.key === " " || event.key === "Enter") { event.preventDefault(); move(video.paused); }
  });
});
at("given").hidden = !given;
store();
draw();
