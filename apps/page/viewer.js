// Draws what `seguncert.apps.sight` sent, all by itself: no knob asks the server. Only a click does, for the full map's numbers.
const root = element.querySelector(".sg"), find = (name) => root.querySelector(".sg-" + name);
const stages = [...root.querySelectorAll(".sg-stage")], canvases = [find("first"), find("second")];
let seen = null;   // the photo under way: sizes, pixels of the photo, labels, regions, maps
let chosen = new Set(), zoom = { by: 1, x: 0, y: 0 }, mark = null, hidden = false, outlined = 0, asked = 0, redraw = 0;

const percent = (p) => p > 0.999 && p < 1 ? "> 99.9 %" : p > 0 && p < 0.001 ? "< 0.1 %" : (p >= 0.1 && p <= 0.99 ? (100 * p).toFixed(0) : (100 * p).toFixed(1)) + " %";
const css = (rgb) => `rgb(${rgb.join(",")})`;
const make = (tag, name, text) => { const made = document.createElement(tag); if (name) made.className = name; if (text !== undefined) made.textContent = text; return made; };

async function pixels(url) {
  const picture = new Image(); picture.src = url; await picture.decode();
  const canvas = document.createElement("canvas"); canvas.width = picture.width; canvas.height = picture.height;
  const context = canvas.getContext("2d", { willReadFrequently: true, colorSpace: "srgb" });
  context.drawImage(picture, 0, 0);
  return context.getImageData(0, 0, picture.width, picture.height).data;
}
const channel = (rgba, k = 0) => { const out = new Uint8Array(rgba.length / 4); for (let i = 0; i < out.length; i++) out[i] = rgba[4 * i + k]; return out; };

const numbers = (rgba) => { const out = new Uint16Array(rgba.length / 4); for (let i = 0; i < out.length; i++) out[i] = rgba[4 * i] * 256 + rgba[4 * i + 1]; return out; };

async function load(value) {
  asked++;  // an answer about the photo before comes too late
  if (!value) { seen = null; root.dataset.state = "empty"; find("body").hidden = true; find("empty").hidden = false; return; }
  const [w, h] = value.shown, urls = [value.photo, value.labels, value.regions, ...value.maps.map((map) => map.picture)];
  const [photo, ...drawings] = await Promise.all(urls.map(pixels)), [labels, regions] = drawings.splice(0, 2).map(numbers);
  const maps = value.maps.map((map, k) => ({ ...map, levels: channel(drawings[k]) }));
  const colours = []; for (const each of value.classes) colours[each.index] = each.colour;
  seen = { ...value, w, h, photo, labels, regions, maps, colours };
  fillMaps(find("map").value, find("other").value);
  chosen = new Set(); mark = null; outlined = 0; zoom = { by: 1, x: 0, y: 0 };
  for (const canvas of canvases) { canvas.width = w; canvas.height = h; canvas.parentElement.style.aspectRatio = `${w} / ${h}`; canvas.parentElement.style.maxWidth = `calc(80vh * ${w / h})`; }
  find("reading").replaceChildren(make("p", "sg-soft", "Click the picture."));
  find("region").replaceChildren();
  find("empty").hidden = true; find("body").hidden = false;
  classes(); regionTable(); draw();
  root.dataset.state = "ready"; root.dataset.token = value.token;
}

function fillMaps(first, second) {  // what was chosen stays chosen, where there still is such a map
  const options = [...seen.maps.map((map) => [map.name, map.title]), ["classes", "Classes, faded by doubt"]];
  find("map").replaceChildren(...options.map(([name, title]) => new Option(title, name, false, name === first)));
  find("other").replaceChildren(new Option("nothing", ""), ...options.map(([name, title]) => new Option(title, name, false, name === second)), new Option("the bare photo", "photo", false, second === "photo"));
}

const byName = (name) => seen.maps.find((map) => map.name === name);

// What a layer does to each pixel: overlay_doubt and fade_classes of seguncert.render, with an opacity.
function paint(canvas, name, until, otherName) {
  const { w, h, photo, labels, colours } = seen, out = new ImageData(w, h), to = out.data;
  const opacity = hidden ? 0 : find("opacity").value / 100, below = Number(find("below").value), all = chosen.size === 0;
  const sure = byName("confidence").levels, limit = below >= 100 ? 256 : Math.round(255 * below / 100);
  const doubts = byName("entropy");
  const layer = (which) => which && which !== "classes" && which !== "photo" ? byName(which) : null;
  const two = [layer(name), layer(otherName)], names = [name, otherName];
  for (let y = 0, i = 0; y < h; y++) for (let x = 0; x < w; x++, i++) {
    const side = x < until ? 0 : 1, map = two[side], j = 4 * i, label = labels[i];
    let r = photo[j], g = photo[j + 1], b = photo[j + 2], R = r, G = g, B = b;
    if (names[side] !== "photo" && sure[i] < limit && (all || chosen.has(label))) {
      if (map) {
        const k = 5 * map.levels[i], table = map.table, p = table[k] / 255, q = table[k + 1] / 255 * (0.299 * r + 0.587 * g + 0.114 * b);
        R = p * r + q + table[k + 2]; G = p * g + q + table[k + 3]; B = p * b + q + table[k + 4];
      } else {
        const certain = doubts ? 1 - doubts.levels[i] / 255 : sure[i] / 255, alpha = 0.65 * ((certain >= 0.5) + (certain >= 0.75) + (certain >= 0.95)) / 3;
        const colour = colours[label]; R = r + alpha * (colour[0] - r); G = g + alpha * (colour[1] - g); B = b + alpha * (colour[2] - b);
      }
      r += opacity * (R - r); g += opacity * (G - g); b += opacity * (B - b);
    }
    to[j] = r; to[j + 1] = g; to[j + 2] = b; to[j + 3] = 255;
  }
  if (outlined) for (let y = 0, i = 0; y < h; y++) for (let x = 0; x < w; x++, i++)
    if (seen.regions[i] === outlined && (x === 0 || y === 0 || x === w - 1 || y === h - 1 || seen.regions[i - 1] !== outlined || seen.regions[i + 1] !== outlined || seen.regions[i - w] !== outlined || seen.regions[i + w] !== outlined)) {
      const j = 4 * i; to[j] = 0; to[j + 1] = 255; to[j + 2] = 255;
    }
  canvas.getContext("2d").putImageData(out, 0, 0);
}

function draw() { if (!redraw) redraw = requestAnimationFrame(() => { redraw = 0; if (seen) drawNow(); }); }
function drawNow() {
  const name = find("map").value, other = find("other").value, sides = other && find("how").value === "sides", slider = other && !sides;
  find("how-box").hidden = !other; find("divide-box").hidden = !slider; find("second-pane").hidden = !sides;
  const at = slider ? Math.round(seen.w * find("divide").value / 100) : seen.w;
  paint(canvases[0], name, at, slider ? other : "");
  if (sides) paint(canvases[1], other, seen.w, "");
  const title = (which) => which === "classes" ? "Classes, faded by doubt" : which === "photo" ? "The bare photo" : byName(which).title;
  find("name-first").textContent = other ? (slider ? `left: ${title(name)} · right: ${title(other)}` : title(name)) : "";
  find("name-second").textContent = sides ? title(other) : "";
  const line = find("line"); line.hidden = !slider;
  if (slider) line.style.left = place(at, 0)[0] + "%";
  find("opacity-told").textContent = find("opacity").value + " %";
  const below = Number(find("below").value);
  find("below-told").textContent = below >= 100 ? "100 %: all are shown" : below + " %";
  const line_told = told(below);
  if (find("told").textContent !== line_told.textContent) find("told").replaceChildren(line_told);  // it is read aloud
  root.dataset.drawn = [name, other, find("how").value, find("divide").value, find("opacity").value, below, [...chosen].join(" ")].join("|");
  legend(name); transform();
}

function told(below) {
  const words = [`${seen.name}:`];
  if (below < 100) words.push(`${percent(seen.below[below])} of the photo is less than ${below} % sure.`);
  else words.push(`${percent(seen.below[70])} of the photo is less than 70 % sure.`);
  words.push(`${seen.width} × ${seen.height} pixels${seen.w < seen.width ? `, shown as ${seen.w} × ${seen.h}; a click reads the photo's own pixel` : ""}${seen.samples ? `, ${seen.samples} samples` : ""}, ${seen.seconds.toFixed(2)} s.`);
  const line = make("span", "", words.join(" ") + " ");
  for (const note of seen.notes) line.append(make("span", "sg-loud", note));
  return line;
}

function legend(name) {
  const box = find("legend"); box.replaceChildren();
  if (name === "classes") {
    box.append(make("div", "sg-ends", "Full colour where entropy is below 5 % of its bound, bare photo from 50 % on."));
    box.setAttribute("aria-label", "Legend: class colours, fading with doubt"); return;
  }
  const map = byName(name), bar = make("canvas"), ends = make("div", "sg-ends"), ticks = make("div", "sg-ticks");
  bar.width = 256; bar.height = 1;
  const strip = new ImageData(256, 1); map.ramp.forEach((rgb, k) => strip.data.set([...rgb, 255], 4 * k));
  bar.getContext("2d").putImageData(strip, 0, 0);
  const words = map.sure_is === "high" ? ["doubtful", "sure"] : ["sure", "doubtful"], head = make("span");
  head.append(make("b", "", map.title), document.createTextNode(` in ${map.unit}${map.cut ? "; colours end at " + map.highest.toPrecision(2) : ""} · ${map.note}`));
  ends.append(make("span", "", words[0]), head, make("span", "", words[1]));
  for (let k = 0; k <= 4; k++) ticks.append(make("span", "", Number((map.highest * k / 4).toPrecision(2))));
  box.append(ends, bar, ticks, make("p", "sg-soft", map.about));
  box.setAttribute("aria-label", `Legend: ${map.title} in ${map.unit}, 0 to ${map.highest.toPrecision(3)}, ${map.note}`);
}

function classes() {
  find("classes").replaceChildren(...seen.classes.map((each) => {
    const chip = make("button"); chip.type = "button"; chip.setAttribute("aria-pressed", "false"); chip.dataset.index = each.index;
    const swatch = make("i", "sg-swatch"); swatch.style.background = css(each.colour);
    chip.append(swatch, make("span", "", each.name), make("span", "sg-soft", `${percent(each.area)} · ${percent(each.confidence)} sure`));
    chip.onclick = () => {
      if (chosen.has(each.index)) chosen.delete(each.index); else chosen.add(each.index);
      chip.setAttribute("aria-pressed", chosen.has(each.index)); draw();
    };
    return chip;
  }));
}

const nameOf = (index) => (seen.classes.find((each) => each.index === index) || { name: "?" }).name;
function regionTable() {
  const table = make("table"), head = make("tr");
  for (const title of ["rank", "class", "area", "mean sure"]) head.append(make("th", "", title));
  const body = make("tbody");
  seen.region_list.forEach((each, k) => {
    const row = make("tr"), swatch = make("i", "sg-swatch"), name = make("td");
    swatch.style.background = css(seen.colours[each.class] || [128, 128, 128]);
    name.append(swatch, document.createTextNode(" " + nameOf(each.class)));
    row.append(make("td", "", k + 1), name, make("td", "", percent(each.share)), make("td", "", percent(each.confidence)));
    row.tabIndex = 0; row.dataset.region = k + 1;
    row.onmouseenter = row.onfocus = () => outline(k + 1);
    row.onmouseleave = () => outline(Number(root.dataset.region || 0));
    row.onclick = () => region(k + 1);
    row.onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); region(k + 1); } };
    body.append(row);
  });
  const thead = make("thead"); thead.append(head); table.append(thead, body);
  find("regions").replaceChildren(table); root.dataset.region = "";
}
function outline(number) { if (outlined !== number) { outlined = number; draw(); } }
function region(number) {
  root.dataset.region = number || "";
  for (const row of find("regions").querySelectorAll("tr")) row.classList.toggle("sg-on", Number(row.dataset.region) === number);
  if (!number) { find("region").replaceChildren(make("p", "sg-soft", "This region is not listed: too small, or not among the least trusted.")); outline(0); return; }
  const each = seen.region_list[number - 1], all = seen.region_list.length;
  find("region").replaceChildren(make("p", "", `${nameOf(each.class)}: ${seen.w < seen.width ? "about " : ""}${each.pixels.toLocaleString("en")} pixels, ${percent(each.share)} of the photo, ${percent(each.confidence)} sure on average; number ${number} of the ${all} listed, counted from the least trusted.`));
  outline(number);
}

// --- places: shown pixels <-> percent of the stage, under the zoom
const place = (x, y) => [100 * (x / seen.w * zoom.by + zoom.x), 100 * (y / seen.h * zoom.by + zoom.y)];
function transform() {
  for (const canvas of canvases) {
    canvas.style.transform = `translate(${100 * zoom.x}%, ${100 * zoom.y}%) scale(${zoom.by})`;
    canvas.classList.toggle("sg-near", zoom.by * canvas.clientWidth / seen.w > 2);
    canvas.parentElement.style.touchAction = zoom.by > 1 ? "none" : "";
  }
  for (const stage of stages) {
    const spot = stage.querySelector(".sg-mark"); spot.hidden = !mark;
    if (mark) { const [left, top] = place(mark.x + 0.5, mark.y + 0.5); spot.style.left = left + "%"; spot.style.top = top + "%"; }
  }
}
function zoomTo(by, fx = 0.5, fy = 0.5) {  // keeps the place at (fx, fy) of the stage where it is
  by = Math.min(32, Math.max(1, by));
  const ux = (fx - zoom.x) / zoom.by, uy = (fy - zoom.y) / zoom.by, hold = (v) => Math.min(0, Math.max(1 - by, v));
  zoom = { by, x: hold(fx - ux * by), y: hold(fy - uy * by) }; draw();
}
function under(event, stage) {
  const box = stage.getBoundingClientRect(), fx = (event.clientX - box.left) / box.width, fy = (event.clientY - box.top) / box.height;
  const x = Math.floor((fx - zoom.x) / zoom.by * seen.w), y = Math.floor((fy - zoom.y) / zoom.by * seen.h);
  return { fx, fy, x: Math.min(seen.w - 1, Math.max(0, x)), y: Math.min(seen.h - 1, Math.max(0, y)) };
}

async function ask(x, y) {
  mark = { x, y }; transform(); region(seen.regions[y * seen.w + x]);
  const turn = ++asked, full = { token: seen.token, x: Math.floor((x + 0.5) * seen.width / seen.w), y: Math.floor((y + 0.5) * seen.height / seen.h) };
  let answer;
  try { answer = await server.pixel(full); } catch (error) { answer = { error: "The server does not answer." }; }
  if (turn === asked && seen) read(answer);
}

function read(answer) {
  const box = find("reading"); root.dataset.read = "";
  if (answer.error) { box.replaceChildren(make("p", "", answer.error)); return; }
  const bars = make("div", "sg-bars"), top = answer.classes.filter((each, k) => k < 5 && (k < 2 || Math.max(each.probability, each.raw) >= 0.001));
  for (const each of top) {
    const track = make("div", "sg-track"), fill = make("i", "sg-fill"), raw = make("i", "sg-raw");
    fill.style.width = 100 * each.probability + "%"; fill.style.background = css(each.colour);
    track.append(fill);
    if (answer.calibrated) { raw.style.left = `calc(${100 * each.raw}% - 1px)`; raw.title = "the net by itself: " + percent(each.raw); track.append(raw); }
    if (each.spread) { const line = make("i", "sg-spread"), low = Math.max(0, each.raw - each.spread), high = Math.min(1, each.raw + each.spread); line.style.left = 100 * low + "%"; line.style.width = 100 * (high - low) + "%"; line.title = "standard deviation of the samples: " + each.spread.toFixed(3); track.append(line); }
    const number = make("span", "sg-number", percent(each.probability)); number.dataset.probability = each.probability; number.dataset.name = each.name;
    const spread = each.spread === undefined ? "" : ` ± ${(100 * each.spread).toFixed(each.spread < 0.1 ? 1 : 0)}`;
    if (answer.calibrated) number.append(make("span", "sg-before", `net: ${percent(each.raw)}${spread}`)); else number.append(document.createTextNode(spread));
    bars.append(make("span", "", each.name), track, number);
  }
  const values = make("div", "sg-values");
  for (const map of seen.maps) if (map.name in answer.maps) values.append(make("span", "", `${map.title.toLowerCase()} ${(answer.maps[map.name] * map.full_scale).toFixed(3)}${map.unit === "probability" ? "" : " " + map.unit}`));
  const key = [answer.calibrated ? "upright line: the net by itself" : "", answer.classes[0].spread !== undefined ? "flat line: ± one standard deviation of the samples, before calibration" : ""].filter(Boolean).join("; ");
  const set = answer.set ? [make("p", "", `Its set: ${answer.set.join(", ") || "empty"}.`)] : [];
  box.replaceChildren(make("p", "sg-soft", `column ${answer.x}, row ${answer.y}`), make("p", "", answer.sentence), ...set, bars, make("p", "sg-soft", key), values);
  root.dataset.read = `${answer.x},${answer.y}`;
}

// --- hands
for (const name of ["map", "other", "how"]) find(name).addEventListener("change", draw);
for (const name of ["opacity", "below", "divide"]) find(name).addEventListener("input", draw);
find("in").onclick = () => zoomTo(zoom.by * 1.6); find("out").onclick = () => zoomTo(zoom.by / 1.6); find("one").onclick = () => zoomTo(1);
const hide = (state) => { if (hidden !== state) { hidden = state; draw(); } };
find("hide").onpointerdown = () => hide(true);
for (const kind of ["pointerup", "pointerleave", "pointercancel", "blur"]) find("hide").addEventListener(kind, () => hide(false));
find("hide").onkeydown = (event) => { if (event.key === " " || event.key === "Enter") { event.preventDefault(); hide(true); } };
find("hide").onkeyup = () => hide(false);
for (const stage of stages) {
  let from = null;
  stage.addEventListener("pointerdown", (event) => { if (seen) { from = { at: under(event, stage), zoom, moved: false, id: event.pointerId }; } });
  stage.addEventListener("pointermove", (event) => {
    if (!from || zoom.by === 1) return;
    const now = under(event, stage), dx = now.fx - from.at.fx, dy = now.fy - from.at.fy;
    if (!from.moved && Math.hypot(dx, dy) > 0.01) { from.moved = true; stage.setPointerCapture(from.id); }
    if (from.moved) { const hold = (v) => Math.min(0, Math.max(1 - zoom.by, v)); zoom = { by: zoom.by, x: hold(from.zoom.x + dx), y: hold(from.zoom.y + dy) }; transform(); if (!find("line").hidden) draw(); }
  });
  stage.addEventListener("pointerup", (event) => { if (from && !from.moved && seen) { const spot = under(event, stage); ask(spot.x, spot.y); } from = null; });
  stage.addEventListener("pointercancel", () => { from = null; });
  stage.addEventListener("wheel", (event) => { if (!seen || !(event.ctrlKey || event.metaKey || zoom.by > 1)) return; event.preventDefault(); const { fx, fy } = under(event, stage); zoomTo(zoom.by * Math.exp(-event.deltaY / 400), fx, fy); }, { passive: false });
}
stages[0].addEventListener("keydown", (event) => {
  if (!seen) return;
  const step = event.shiftKey ? 10 : 1, moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  if (moves) { mark = mark || { x: seen.w >> 1, y: seen.h >> 1 }; mark = { x: Math.min(seen.w - 1, Math.max(0, mark.x + moves[0])), y: Math.min(seen.h - 1, Math.max(0, mark.y + moves[1])) }; transform(); }
  else if (event.key === "Enter" && mark) ask(mark.x, mark.y);
  else if (event.key === "+" || event.key === "=") zoomTo(zoom.by * 1.6);
  else if (event.key === "-") zoomTo(zoom.by / 1.6);
  else if (event.key === "0") zoomTo(1);
  else return;
  event.preventDefault();
});
const typing = (event) => /^(input|textarea|select)$/i.test(event.target.tagName) && event.target.type !== "range";
document.addEventListener("keydown", (event) => { if (event.key.toLowerCase() === "h" && !typing(event) && !event.ctrlKey && !event.metaKey && seen && root.offsetParent) hide(true); });
document.addEventListener("keyup", (event) => { if (event.key.toLowerCase() === "h") hide(false); });
window.addEventListener("blur", () => hide(false));
let turn = Promise.resolve();
watch("value", () => { const value = props.value; turn = turn.then(() => load(value)).catch((error) => { console.error(error); find("empty").textContent = "This picture could not be drawn: " + error.message; find("empty").hidden = false; }); });
if (props.value) load(props.value);
