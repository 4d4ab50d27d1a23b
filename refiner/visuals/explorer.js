// The explorer's page: two linked maps, what is near, and the curves of all blocks, which are the
// slider. A notebook's widget and a file without a kernel run it; `source` tells them apart.

const GLIDE = 350; // ms that one step of the slider takes; a quicker one jumps
const REACH = 1.08; // of a map's axes; points lie within -1…1
const MANY = 20000; // points beyond which none glides
const NS = "http://www.w3.org/2000/svg";
const MARKS = {
  circle: (p, r) => p.arc(0, 0, r, 0, 7),
  square: (p, r) => p.rect(-0.87 * r, -0.87 * r, 1.74 * r, 1.74 * r),
  triangle: (p, r) => polygon(p, r * 1.2, 3, -Math.PI / 2),
  diamond: (p, r) => polygon(p, r * 1.2, 4, 0),
  down: (p, r) => polygon(p, r * 1.2, 3, Math.PI / 2),
  plus: (p, r) => cross(p, r, 0),
  cross: (p, r) => cross(p, r, Math.PI / 4),
};
const polygon = (p, r, n, turn) => {
  for (let i = 0; i < n; i++) {
    const a = turn + (2 * Math.PI * i) / n;
    p[i ? "lineTo" : "moveTo"](r * Math.cos(a), r * Math.sin(a));
  }
  p.closePath();
};
const cross = (p, r, turn) => {
  const m = new DOMMatrix().rotate((turn * 180) / Math.PI), bar = new Path2D();
  bar.rect(-1.15 * r, -0.4 * r, 2.3 * r, 0.8 * r);
  bar.rect(-0.4 * r, -1.15 * r, 0.8 * r, 2.3 * r);
  p.addPath(bar, m);
};
const mark = (name, r) => {
  const path = new Path2D();
  MARKS[name](path, r);
  return path;
};
const percent = (x) => (x == null || Number.isNaN(x) ? "–" : `${Math.round(100 * x)} %`);
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const numbers = (given, Kind) => {
  if (given == null) return null;
  if (typeof given !== "string")
    return new Kind(given.buffer.slice(given.byteOffset, given.byteOffset + given.byteLength));
  return new Kind(Uint8Array.from(atob(given), (c) => c.charCodeAt(0)).buffer);
};
const make = (tag, attributes = {}, ...inside) => {
  const one = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    key.startsWith("on") ? one.addEventListener(key.slice(2), value) : one.setAttribute(key, value);
  one.append(...inside);
  return one;
};
const save = (download, href) => make("a", { download, href }).click();
const drawn = (tag, attributes, text = "") => {
  const one = document.createElementNS(NS, tag);
  for (const key in attributes) one.setAttribute(key, attributes[key]);
  one.textContent = text;
  return one;
};

function explorer(el, source) {
  const t = source.tables, { n, k, classes } = t;
  const labels = numbers(t.labels, Int32Array);
  const models = {}, known = new Map();
  let s = { ...source.state }, only = null, hovered = null, lasso = null, back = [], turns = {};
  let last = 0, playing = null, colour = null, all = false, held = {};

  function read(tables) {
    for (const m of tables.models) {
      const xy = {};
      for (const name in m.xy) xy[name] = numbers(m.xy[name], Int16Array);
      const given = { near: numbers(m.near, Uint16Array), wrong: numbers(m.wrong, Uint8Array) };
      models[m.name] = { ...m, ...given, xy };
    }
  }
  read(t);
  const names = Object.keys(models);
  const depth = Math.max(...names.map((name) => models[name].blocks.length));
  const colours = Object.fromEntries(
    t.colours.map((c) => [c.name, { ...c, codes: numbers(c.codes, Uint16Array) }]));

  // ------------------------------------------------------------ what a state shows

  const at = (side, state = s) => {
    const name = side ? state.right : state.left;
    const asked = (side && state.right_block) || state.block;
    return [name, Math.min(asked, models[name].blocks.length) - 1];
  };
  const title = (side) => `${at(side)[0]}, block ${models[at(side)[0]].blocks[at(side)[1]]}`;
  const once = (key, made) => (known.has(key) || known.set(key, made()), known.get(key));
  const near = (side, i) => {
    const [name, b] = at(side), table = models[name].near;
    if (table) return table.subarray((b * n + i) * k, (b * n + i + 1) * k);
    return once(`near ${name} ${b} ${i}`, () => (source.ask({ near: [name, b, i] }), null));
  };
  // Of every image, neighbors of its class on one side (0…k), and neighbors that both share.
  const rights = (side) => once(`right ${at(side)}`, () =>
    Uint8Array.from({ length: n }, (_, i) => own(side, i)));
  const own = (side, i) => (near(side, i) || []).reduce((sum, j) => sum + (labels[j] === labels[i]), 0);
  const common = (i) => {
    const [a, b] = [near(0, i), near(1, i)];
    return a && b ? a.reduce((sum, j) => sum + b.includes(j), 0) : 0;
  };
  const shared = () => once(`shared ${at(0)} ${at(1)}`, () =>
    Uint8Array.from({ length: n }, (_, i) => common(i)));
  const complete = names.every((name) => models[name].near);
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / (values.length || 1);

  function coloured(side) { // the code of each point, and what a code looks like
    const c = colours[s.colour];
    if (c.codes) return { ...c, key: c.name };
    const [name, b] = at(side), key = `${c.name} ${at(0)} ${at(1)} ${side}`;
    const codes = once(`colour ${key}`, () => c.name === "neighbor change"
      ? Uint8Array.from(shared(), (x) => Math.round((254 * (k - x)) / k))
      : models[name].wrong.subarray(b * n, (b + 1) * n));
    return { ...c, codes, key };
  }

  // ------------------------------------------------------------ the page

  const select = (label, key, options) => make("label", {}, `${label} `, make("select",
    { "data-key": key, "aria-label": label, onchange: (e) => change({ [key]: options[e.target.selectedIndex][1] }) },
    ...options.map(([text]) => make("option", {}, text))));
  const button = (text, tip, onclick) => make("button", { title: tip, onclick, type: "button" }, text);
  const pick = names.map((name) => [name, name]);
  const blocks = Array.from({ length: depth }, (_, b) => [`block ${b + 1}`, b + 1]);
  const layouts = [["PCA", "pca"], ["UMAP", "umap"]].filter(
    ([, name]) => source.live || models[names[0]].xy[name]);
  const find = make("input", { type: "search", placeholder: "17, or 5-9, or a class",
    "aria-label": "Find", onsearch: () => search(find.value), onkeydown: (e) => {
      e.stopPropagation(); // JupyterLab would take Enter for itself
      if (e.key !== "Enter") return;
      e.preventDefault(); // its search event would ask again
      search(find.value);
    } });
  const bar = make("div", { class: "rx-bar" },
    select("Left model", "left", pick), select("Right model", "right", pick),
    select("Right block", "right_block", [["as on the left", null], ...blocks]),
    select("Map", "layout", layouts), select("Colour by", "colour", t.colours.map((c) => [c.name, c.name])));
  const look = [["most improved", 1], ["most lost", -1], ["most changed", 0]].filter(
    ([, way]) => complete && (labels || !way));
  const tools = make("div", { class: "rx-bar" }, make("label", {}, "Find ", find),
    ...(look.length ? [make("span", {}, "Look at: ")] : []),
    ...look.map(([text, way]) => button(text, "press again for the next", () => extreme(text, way))),
    button("Clear selection", "no image and no group (Escape)", () => clear()),
    button("Reset view", "undo zoom and pan", () => (reset(), paint())),
    button("Save CSV", "download what is chosen", () => source.live ? source.ask({ save: "csv" }) : csv()),
    ...(source.live ? [button("Save PNG", "download the figure", () => {
      tell("The figure is being drawn …");
      source.ask({ save: "png" });
    })] : []));
  const maps = [0, 1].map((side) => {
    const canvas = make("canvas", { tabindex: 0, role: "application" });
    const caption = make("figcaption");
    return { canvas, caption, side, figure: make("figure", { class: "rx-map" }, caption, canvas),
      xy: new Float32Array(2 * n), px: new Float32Array(2 * n), view: { z: 1, x: 0, y: 0 }, key: "" };
  });
  const inspector = make("aside", { class: "rx-inspector", "aria-label": "Inspector" });
  const curve = drawn("svg", { class: "rx-curve", tabindex: 0, role: "slider", "aria-label": "block",
    "aria-valuemin": 1, "aria-valuemax": depth });
  const play = button("▶", "Play through the blocks", () => playOn(!playing));
  const legend = make("div", { class: "rx-legend" });
  const say = make("div", { class: "rx-say", role: "status", "aria-live": "polite" });
  const tip = make("div", { class: "rx-tip" });
  const main = make("div", { class: "rx-main" }, ...maps.map((m) => m.figure), inspector);
  const root = make("div", { class: "refiner-explorer" }, bar, main,
    make("div", { class: "rx-steps" }, play, curve), legend, tools, say, tip);
  el.append(root);

  const tell = (text, bad = false) => {
    say.textContent = text;
    say.setAttribute("role", bad ? "alert" : "status");
  };
  const called = (i) => `image ${i}${labels ? `, ${classes[labels[i]]}` : ""}`;
  function picture(i, size, { framed = "", note = "", click = () => choose(i) } = {}) {
    const words = called(i) + (note && `, ${note}`);
    const one = make("button", { type: "button", class: `rx-picture ${framed}`, title: words,
      "aria-label": words, "data-image": i, onclick: click,
      onmouseenter: () => hover(i), onmouseleave: () => hover(null) });
    one.style.width = one.style.height = `${size}px`;
    source.show(i, one, size);
    return one;
  }

  // ------------------------------------------------------------ changes

  function change(changes) {
    tell(""); // it was about what was shown before
    s = { ...s, ...changes };
    if (changes.layout && !models[names[0]].xy[changes.layout]) {
      source.push(s); // UMAP is made by the kernel; until it comes the old map stays
      s = { ...s, layout: "pca" };
      return controls();
    }
    s.block = clamp(s.block, 1, Math.max(models[s.left].blocks.length, models[s.right].blocks.length));
    source.push(s);
    update();
  }
  const choose = (i, more = {}) => {
    if (s.selected != null && s.selected !== i) back.push(s.selected);
    show(i, more);
  };
  const show = (i, more = {}) => {
    tip.style.display = "none"; // it may cover neighbors
    change({ ...more, selected: i });
    tell(`Selected ${called(i)}. ${verdict(i)}`);
  };
  const clear = () => {
    only = null; back = []; find.value = "";
    change({ selected: null, group: [] });
  };
  const group = (indices) => ((back = []), change({ selected: null, group: indices }));
  function search(text) {
    only = null;
    const asked = text.trim().toLowerCase();
    if (!asked) return clear();
    const c = classes.findIndex((name) => name.toLowerCase() === asked);
    const spans = asked.split(",").map((part) => part.trim().match(/^(\d+)(?:\s*-\s*(\d+))?$/));
    let found = [];
    if (c >= 0) found = members(labels, c);
    else if (spans.every(Boolean))
      for (const [, a, b] of spans) for (let i = +a; i <= Math.min(+(b ?? a), n); i++) found.push(i);
    else return tell(`nothing is called '${text.trim()}'; type a position from 0 to ${n - 1}` +
      (labels ? `, or a class: ${classes.slice(0, 20).join(", ")}` : ""), true);
    if (!found.length || Math.max(...found) >= n) return tell(`there are images 0 to ${n - 1}`, true);
    if (found.length === 1) return choose(found[0], { group: [] });
    group(found);
    tell(`${found.length} images`);
  }
  const members = (values, code) => {
    const found = [];
    values.forEach((x, i) => x === code && found.push(i));
    return found;
  };
  const ranked = (way) => once(`ranked ${way} ${at(0)} ${at(1)}`, () => {
    const [before, after] = way ? [rights(0), rights(1)] : [shared(), null];
    const value = (i) => (way ? way * (after[i] - before[i]) : -before[i]);
    return Array.from({ length: n }, (_, i) => i).sort((i, j) => value(j) - value(i) || i - j);
  });
  function extreme(text, way) {
    const { codes } = coloured(0); // of what is chosen or shown alone
    const order = ranked(way).filter((i) => (!held.inside || held.inside.has(i)) && (only == null || codes[i] === only));
    if (turns.way !== way || turns.among !== order.length) turns = { way, among: order.length, turn: -1 };
    const turn = (turns.turn = (turns.turn + 1) % Math.min(order.length, 50));
    choose(order[turn]);
    tell(`${text}, number ${turn + 1} of ${order.length}: ${called(order[turn])}. ${verdict(order[turn])}`);
  }
  function csv() { // in a file; the kernel's holds places and factors, too
    const how = new Map(), i = s.selected, named = (x) => `"${x.replaceAll('"', '""')}"`;
    if (i != null) ["left", "right"].forEach((name, side) => near(side, i).forEach((j) =>
      how.set(j, how.has(j) ? "near on both sides" : `near on the ${name}`)));
    s.group.forEach((j) => how.set(j, "group"));
    if (i != null) how.set(i, "selected");
    if (!how.size) return tell("nothing is chosen: click a point, lasso some, or search for a class", true);
    const rows = [...how].map(([j, why]) => [j, labels ? named(classes[labels[j]]) : "", why].join());
    const text = encodeURIComponent(["image,class,chosen", ...rows, ""].join("\n"));
    save("explorer.csv", `data:text/csv;charset=utf-8,${text}`);
  }
  function verdict(i) {
    const [a, b] = [near(0, i), near(1, i)];
    if (!a || !b) return "Its neighbors are being searched.";
    const right = labels ? `Right neighbors ${own(0, i)} → ${own(1, i)} of ${k}; ` : "";
    return `${right}${common(i)} of ${k} shared by both models.`;
  }
  function playOn(on) {
    clearInterval(playing);
    playing = on ? setInterval(() => change({ block: (s.block % depth) + 1 }), 1200) : null;
    play.textContent = on ? "⏸" : "▶";
    play.setAttribute("aria-label", on ? "Pause" : "Play through the blocks");
  }

  // ------------------------------------------------------------ drawing maps

  // Asked once, as an answer makes the browser lay out the page that has just changed.
  const theme = {};
  function measure() {
    const own = getComputedStyle(root);
    for (const name of ["paper", "ink", "right", "wrong"]) theme[name] = own.getPropertyValue(`--rx-${name}`).trim();
    for (const m of maps) m.size = [m.canvas.clientWidth, m.canvas.clientHeight];
    theme.curve = [curve.clientWidth, curve.clientHeight];
  }
  const reset = () => maps.forEach((m) => (m.view = { z: 1, x: 0, y: 0 }));
  function moved(m) { // the points' places of a state, gliding there where a single step was made
    const [name, b] = at(m.side), key = `${name} ${b} ${s.layout}`;
    if (key === m.key) return;
    const whole = models[name].xy[s.layout], now = performance.now();
    const to = new Float32Array(2 * n), start = 2 * b * n;
    for (let i = 0; i < 2 * n; i++) to[i] = whole[start + i] / 32767;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const glides = m.key && !still && n <= MANY && now - last > GLIDE;
    m.from = glides ? m.xy.slice() : null;
    Object.assign(m, { key, to, began: now });
    if (!glides) m.xy = to;
  }
  function paint() {
    const now = performance.now();
    let more = false;
    for (const m of maps) {
      if (m.from) {
        const u = clamp((now - m.began) / GLIDE, 0, 1), ease = u * u * (3 - 2 * u);
        if (u >= 1) [m.xy, m.from] = [m.to, null];
        else m.xy = m.from.map((x, i) => x + ease * (m.to[i] - x));
        more ||= u < 1;
      }
      draw(m);
    }
    if (more) requestAnimationFrame(paint);
  }
  function place(m) {
    const { xy, px, view, size: [w, h] } = m;
    const unit = (Math.min(w, h) / 2 / REACH) * view.z;
    for (let i = 0; i < n; i++) {
      px[2 * i] = w / 2 + view.x + unit * xy[2 * i];
      px[2 * i + 1] = h / 2 + view.y - unit * xy[2 * i + 1];
    }
  }
  const rgb = (shade) => once(`rgb ${shade}`, () => {
    const g = make("canvas", { width: 1, height: 1 }).getContext("2d");
    g.fillStyle = shade;
    g.fillRect(0, 0, 1, 1);
    return [...g.getImageData(0, 0, 1, 1).data];
  });
  // A mark's pixels for points of any colour: x, y, share of its fill against its rim, opacity; …
  const stamp = (name, r, ratio) => once(`stamp ${name} ${r} ${ratio}`, () => {
    const size = Math.ceil((2.6 * r + 2) * ratio), found = [];
    const g = make("canvas", { width: size, height: size }).getContext("2d"), path = mark(name, r);
    g.setTransform(ratio, 0, 0, ratio, size / 2, size / 2);
    [g.fillStyle, g.strokeStyle, g.lineWidth] = ["#fff", "#000", 0.4];
    g.fill(path);
    g.stroke(path);
    g.getImageData(0, 0, size, size).data.forEach((x, at, all) => at % 4 === 3 && x && found.push(
      (at >> 2) % size - (size >> 1), Math.floor((at >> 2) / size) - (size >> 1), all[at - 1] / 255, x / 255));
    return Float32Array.from(found);
  });
  // All points, put together by hand: ten thousand calls to a canvas take a second without a graphics card.
  function points(m, image, c, r, ratio, inside) {
    const { width, height, data } = image, paper = rgb(theme.paper), { px } = m;
    const ink = c.palette.map(rgb), shapes = (c.marks || ["circle"]).map((name) => stamp(name, r, ratio));
    new Uint32Array(data.buffer).fill(new Uint32Array(Uint8Array.from(paper).buffer)[0]);
    const edge = Math.ceil((1.3 * r + 2) * ratio);
    for (let i = 0; i < n; i++) {
      const x = Math.round(px[2 * i] * ratio), y = Math.round(px[2 * i + 1] * ratio), code = c.codes[i];
      if (x < edge || y < edge || x >= width - edge || y >= height - edge) continue;
      const fade = only != null && code !== only ? 0.07 : inside && !inside.has(i) ? 0.55 : 0.9;
      const [red, green, blue] = ink[code % ink.length], shape = shapes[code % shapes.length];
      for (let p = 0; p < shape.length; p += 4) {
        const o = 4 * ((y + shape[p + 1]) * width + x + shape[p]), fill = shape[p + 2], share = shape[p + 3] * fade;
        data[o] += share * (paper[0] + fill * (red - paper[0]) - data[o]);
        data[o + 1] += share * (paper[1] + fill * (green - paper[1]) - data[o + 1]);
        data[o + 2] += share * (paper[2] + fill * (blue - paper[2]) - data[o + 2]);
      }
    }
  }
  function draw(m) {
    const { canvas, px, size: [w, h] } = m, ratio = devicePixelRatio || 1;
    if (!w) return;
    if (canvas.width !== Math.round(w * ratio)) canvas.width = Math.round(w * ratio);
    if (canvas.height !== Math.round(h * ratio)) canvas.height = Math.round(h * ratio);
    const g = canvas.getContext("2d"), c = coloured(m.side);
    const r = Math.round(2 * clamp(Math.sqrt(9000 / n), 1.5, 4.5) * Math.sqrt(m.view.z)) / 2;
    if (held.group !== s.group) held = { group: s.group, inside: s.group.length ? new Set(s.group) : null };
    const { inside } = held;
    const looks = [m.xy, inside, c.codes, c.palette, only, canvas.width, canvas.height, theme.paper,
      ...Object.values(m.view)];
    if (!m.looks || looks.some((x, i) => x !== m.looks[i])) { // else what hovers or is ringed has changed
      m.looks = looks;
      place(m);
      if (m.image?.width !== canvas.width || m.image.height !== canvas.height)
        m.image = g.createImageData(canvas.width, canvas.height);
      points(m, m.image, c, r, ratio, inside);
    }
    g.putImageData(m.image, 0, 0);
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    if (inside) ringAll(g, px, s.group, r + 1.5);
    if (c.names && c.names.length > 1 && c.names.length <= 24) islands(g, m, c, w, h);
    if (s.selected != null) neighbors(g, m);
    if (hovered != null) ring(g, px, hovered, r + 4, theme.ink, 2);
    if (lasso?.m === m) outline(g, lasso.path);
  }
  function ring(g, px, i, r, ink, width, square = false) {
    g.beginPath();
    const x = px[2 * i], y = px[2 * i + 1];
    square ? g.rect(x - r, y - r, 2 * r, 2 * r) : g.arc(x, y, r, 0, 7);
    [g.strokeStyle, g.lineWidth] = [theme.paper, width + 2];
    g.stroke();
    [g.strokeStyle, g.lineWidth] = [ink, width];
    g.stroke();
  }
  function ringAll(g, px, some, r) {
    g.beginPath();
    for (const i of some) {
      g.moveTo(px[2 * i] + r, px[2 * i + 1]);
      g.arc(px[2 * i], px[2 * i + 1], r, 0, 7);
    }
    [g.strokeStyle, g.lineWidth] = [theme.ink, 0.8];
    g.stroke();
  }
  function neighbors(g, m) { // joined and numbered; round is right, square is wrong
    const i = s.selected, { px } = m, found = near(m.side, i) || [];
    g.strokeStyle = theme.ink;
    g.lineWidth = 0.7;
    for (const j of found) {
      g.beginPath();
      g.moveTo(px[2 * i], px[2 * i + 1]);
      g.lineTo(px[2 * j], px[2 * j + 1]);
      g.stroke();
    }
    found.forEach((j, rank) => {
      const right = !labels || labels[j] === labels[i];
      ring(g, px, j, 7, right ? theme.right : theme.wrong, 2.5, !right);
      written(g, rank + 1, px[2 * j] + 9, px[2 * j + 1] - 8, "bold 11px sans-serif");
    });
    ring(g, px, i, 9, theme.ink, 4);
  }
  function written(g, text, x, y, font) {
    [g.font, g.textAlign, g.textBaseline, g.lineJoin] = [font, "center", "middle", "round"];
    [g.strokeStyle, g.lineWidth, g.fillStyle] = [theme.paper, 3, theme.ink];
    g.strokeText(text, x, y);
    g.fillText(text, x, y);
  }
  function islands(g, m, c, w, h) { // each name where its points lie densest, unless another is there
    const spots = once(`islands ${m.key} ${c.key}`, () => {
      const xy = m.to, cells = new Map(), best = [];
      for (let i = 0; i < n; i++) {
        const cell = [c.codes[i], Math.round(5 * xy[2 * i]), Math.round(5 * xy[2 * i + 1])].join();
        const sum = cells.get(cell) || cells.set(cell, [0, 0, 0]).get(cell);
        sum[0] += 1; sum[1] += xy[2 * i]; sum[2] += xy[2 * i + 1];
      }
      for (const [cell, [count, x, y]] of cells) {
        const code = parseInt(cell);
        if (!best[code] || count > best[code].count) best[code] = { code, count, x: x / count, y: y / count };
      }
      return best.filter(Boolean).sort((a, b) => b.count - a.count);
    });
    if (m.from) return;
    const unit = (Math.min(w, h) / 2 / REACH) * m.view.z, taken = [];
    g.font = "600 12px sans-serif";
    g.globalAlpha = s.selected == null ? 1 : 0.45; // its neighbors' numbers count more
    for (const { code, x, y } of spots) {
      if (only != null && code !== only) continue;
      const half = g.measureText(c.names[code]).width / 2 + 2;
      const cx = clamp(w / 2 + m.view.x + unit * x, half, w - half), cy = h / 2 + m.view.y - unit * y;
      if (taken.some(([a, b, d]) => Math.abs(a - cx) < d + half && Math.abs(b - cy) < 13)) continue;
      taken.push([cx, cy, half]);
      written(g, c.names[code], cx, cy, "600 12px sans-serif");
    }
    g.globalAlpha = 1;
  }
  function outline(g, path) {
    g.beginPath();
    path.forEach(([x, y], i) => g[i ? "lineTo" : "moveTo"](x, y));
    g.closePath();
    g.fillStyle = "rgba(0,114,178,.15)";
    g.fill();
    [g.strokeStyle, g.lineWidth] = [theme.right, 1.5];
    g.stroke();
  }

  // ------------------------------------------------------------ mouse and keyboard on maps

  function closest(m, x, y) {
    let best = null, least = 144;
    for (let i = 0; i < n; i++) {
      const d = (m.px[2 * i] - x) ** 2 + (m.px[2 * i + 1] - y) ** 2;
      if (d < least) [best, least] = [i, d];
    }
    return best;
  }
  const local = (m, e) => {
    const box = m.canvas.getBoundingClientRect();
    return [e.clientX - box.left, e.clientY - box.top];
  };
  function hover(i, e = null) {
    if (hovered === i) return;
    hovered = i;
    tip.style.display = i != null && e ? "block" : "none";
    if (i != null && e) {
      const box = root.getBoundingClientRect();
      tip.replaceChildren(picture(i, 64), called(i));
      tip.style.left = `${clamp(e.clientX - box.left + 14, 0, box.width - 120)}px`;
      tip.style.top = `${e.clientY - box.top + 14}px`;
    }
    paint();
  }
  function listen(m) {
    const { canvas } = m;
    let down = null;
    canvas.onpointerdown = (e) => {
      canvas.setPointerCapture(e.pointerId);
      down = { at: local(m, e), view: { ...m.view }, far: false };
      if (e.shiftKey) lasso = { m, path: [down.at] };
    };
    canvas.onpointermove = (e) => {
      const [x, y] = local(m, e);
      if (!down) return hover(closest(m, x, y), e);
      down.far ||= Math.hypot(x - down.at[0], y - down.at[1]) > 4;
      if (lasso) lasso.path.push([x, y]);
      else if (down.far)
        Object.assign(m.view, { x: down.view.x + x - down.at[0], y: down.view.y + y - down.at[1] });
      paint();
    };
    canvas.onpointerup = (e) => {
      const drawnPath = lasso?.path, clicked = down && !down.far;
      lasso = down = null;
      if (clicked) {
        const i = closest(m, ...local(m, e));
        i == null ? clear() : choose(i);
      } else if (drawnPath) {
        const path = new Path2D(), g = canvas.getContext("2d");
        drawnPath.forEach(([x, y], i) => path[i ? "lineTo" : "moveTo"](x, y));
        g.setTransform(1, 0, 0, 1, 0, 0);
        const some = [];
        for (let i = 0; i < n; i++) if (g.isPointInPath(path, m.px[2 * i], m.px[2 * i + 1])) some.push(i);
        if (some.length) group(some), tell(`${some.length} images`);
      }
      paint();
    };
    canvas.onpointerleave = () => hover(null);
    const zoom = (by, [x, y]) => {
      const z = clamp(m.view.z * by, 1, 40), q = z / m.view.z;
      const [cx, cy] = [x - canvas.clientWidth / 2, y - canvas.clientHeight / 2];
      m.view = z === 1 ? { z, x: 0, y: 0 } : { z, x: cx - q * (cx - m.view.x), y: cy - q * (cy - m.view.y) };
      paint();
    };
    canvas.addEventListener("wheel", (e) => {
      if (m.view.z === 1 && e.deltaY > 0) return; // the page scrolls on
      e.preventDefault();
      zoom(Math.exp(-e.deltaY / 400), local(m, e));
    }, { passive: false });
    canvas.onkeydown = (e) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
      const by = { "+": 1.3, "-": 1 / 1.3 }[e.key], i = s.selected;
      if (e.key === "Escape") clear();
      else if (by) zoom(by, i == null ? [canvas.clientWidth / 2, canvas.clientHeight / 2] : [m.px[2 * i], m.px[2 * i + 1]]);
      else if (step) choose((((s.selected ?? -step) + step) % n + n) % n);
      else return;
      e.preventDefault();
      e.stopPropagation();
    };
  }
  maps.forEach(listen);

  // ------------------------------------------------------------ curves that are the slider

  const lines = () => once(`lines ${s.left} ${s.right}`, () => {
    const shown = [...new Set([s.left, s.right])];
    const own = shown.map((name) => ({ name, values: models[name].accuracy || models[name].kept }));
    if (shown.length < 2 || !complete) return own;
    const both = Array.from({ length: Math.min(...shown.map((name) => models[name].blocks.length)) },
      (_, b) => once(`common ${shown} ${b}`, () => {
        const now = s;
        s = { ...s, block: b + 1, right_block: null };
        const share = mean(shared()) / k;
        s = now;
        return share;
      }));
    return [...own, { name: "neighbors in common", values: both, thin: true }];
  });
  function steps() {
    const [w, h] = theme.curve[0] ? theme.curve : [600, 108], pad = { l: 46, r: 178, t: 18, b: 22 };
    const x = (b) => pad.l + ((w - pad.l - pad.r) * (b - 1)) / Math.max(depth - 1, 1);
    const shown = lines(), top = Math.min(1, Math.max(...shown.flatMap((l) => l.values)) * 1.1);
    const y = (v) => h - pad.b - (h - pad.t - pad.b) * (v / (top || 1));
    const what = models[s.left].accuracy ? `k-NN accuracy by block (k = ${k})` : "Neighbors kept to the last block, by block";
    const parts = [drawn("text", { x: pad.l, y: 11, class: "rx-title" }, `${what}, ringed where best: click, drag or use the arrow keys`)];
    for (const share of [0, top / 2, top])
      parts.push(drawn("text", { x: pad.l - 6, y: y(share) + 4, "text-anchor": "end" }, percent(share)));
    for (let b = 1; b <= depth; b++)
      parts.push(drawn("text", { x: x(b), y: h - 6, "text-anchor": "middle" }, b));
    const now = new Set([s.block, s.right_block || s.block]);
    for (const b of now) parts.push(drawn("line", { x1: x(b), x2: x(b), y1: pad.t, y2: h - pad.b, class: "rx-now" }));
    let beside = [];
    shown.forEach(({ name, values, thin }, i) => {
      const points = values.map((v, b) => `${x(b + 1)},${y(v)}`).join(" ");
      parts.push(drawn("polyline", { points, class: thin ? "rx-line2" : `rx-line${i}` }));
      if (!thin) values.forEach((v, b) => parts.push(drawn(i ? "rect" : "circle", i
        ? { x: x(b + 1) - 3, y: y(v) - 3, width: 6, height: 6, class: "rx-dot1" }
        : { cx: x(b + 1), cy: y(v), r: 3.5, class: "rx-dot0" })));
      const best = values.indexOf(Math.max(...values));
      if (!thin) parts.push(drawn("circle", { cx: x(best + 1), cy: y(values[best]), r: 7, class: `rx-best${i}` }));
      beside.push({ name, best, v: values[Math.min(s.block, values.length) - 1], i: thin ? 2 : i, end: y(values.at(-1)) });
    });
    beside.sort((a, b) => a.end - b.end).forEach((one, i, all) => {
      one.end = Math.max(one.end, i ? all[i - 1].end + 13 : 0);
      const short = one.name.length > 19 ? `${one.name.slice(0, 17)}…` : one.name;
      const text = drawn("text", { x: w - pad.r + 8, y: one.end + 4, class: `rx-name${one.i}` }, `${"●■–"[one.i]} ${short} ${percent(one.v)}`);
      text.append(drawn("title", {}, `${one.name}, highest in block ${one.best + 1}`));
      parts.push(text);
    });
    curve.replaceChildren(...parts);
    curve.setAttribute("aria-valuenow", s.block);
    curve.setAttribute("aria-valuetext", `block ${s.block}: ` + beside.map((one) => `${one.name} ${percent(one.v)}`).join(", ") +
      shown.flatMap((one, i) => (one.thin ? [] : `; ${one.name} is best in block ${beside.find((x) => x.i === i).best + 1}`)).join(""));
    curve.blockAt = (px) => clamp(Math.round(1 + ((px - pad.l) * (depth - 1)) / (w - pad.l - pad.r)), 1, depth);
  }
  const dragged = (e) => {
    const block = curve.blockAt(e.clientX - curve.getBoundingClientRect().left);
    if (e.buttons && block !== s.block) change({ block });
  };
  curve.addEventListener("pointerdown", (e) => (curve.setPointerCapture(e.pointerId), playOn(false), dragged(e)));
  curve.addEventListener("pointermove", dragged);
  curve.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -99, End: 99 }[e.key];
    if (!step) return;
    e.preventDefault();
    e.stopPropagation();
    change({ block: clamp(s.block + step, 1, depth) });
  });

  // ------------------------------------------------------------ inspector and legend

  function inspect() {
    const i = s.selected;
    if (i == null) return inspector.replaceChildren(...(s.group.length ? together() : gains()));
    const head = make("div", { class: "rx-head" }, picture(i, 72, { click: () => {} }), make("div", {},
      make("b", {}, `Image ${i}`), make("div", {}, labels ? classes[labels[i]] : ""),
      ...(back.length ? [button("Back", "the image before", () => show(back.pop()))]
        : s.group.length ? [button("Back to the group", "", () => change({ selected: null }))] : [])));
    const [a, b] = [near(0, i), near(1, i)];
    if (!a || !b) return inspector.replaceChildren(head, "Searching its neighbors …");
    const words = make("div", {}, verdict(i));
    const rows = [a, b].flatMap((found, side) => [
      make("div", { class: "rx-row" }, make("b", {}, title(side))),
      make("div", { class: "rx-pictures" }, ...Array.from(found, (j, rank) => {
        const right = labels ? labels[j] === labels[i] : null, both = (side ? a : b).includes(j);
        const note = `neighbor ${rank + 1}` + (both ? ", shared by both models" : "") +
          (right == null ? "" : right ? ", same class" : ", another class");
        const one = picture(j, 42, { framed: right == null ? "" : right ? "rx-ok" : "rx-no", note });
        one.append(make("span", {}, `${rank + 1}${right == null ? "" : right ? "✓" : "✗"}${both ? "★" : ""}`));
        return one;
      }))]);
    const key = make("small", {}, (labels ? "✓ same class, ✗ another; " : "") + "★ shared by both models");
    inspector.replaceChildren(head, words, ...rows, key);
  }
  function together() { // a group
    const some = s.group, parts = [make("b", {}, `${some.length} images`)];
    if (labels) {
      const counts = new Map();
      some.forEach((i) => counts.set(labels[i], (counts.get(labels[i]) || 0) + 1));
      const order = [...counts].sort((x, y) => y[1] - x[1]);
      parts.push(make("div", {}, order.slice(0, 6).map(([c, m]) => `${classes[c]} ${m}`).join(", ") +
        (order.length > 6 ? ` and ${order.length - 6} more classes` : "")));
    }
    if (complete) {
      if (labels) parts.push(make("div", {}, `Right neighbors ${percent(mean(some.map((i) => rights(0)[i])) / k)} → ` +
        percent(mean(some.map((i) => rights(1)[i])) / k)));
      parts.push(make("div", {}, `Shared by both models ${percent(mean(some.map((i) => shared()[i])) / k)}`));
    }
    const order = complete ? [...some].sort((i, j) => shared()[i] - shared()[j]) : some;
    parts.push(make("small", {}, (complete ? "Most changed first" : "") + (some.length > 30 ? ` (30 of ${some.length})` : "")),
      make("div", { class: "rx-pictures" }, ...order.slice(0, 30).map((i) => picture(i, 42))));
    return parts;
  }
  function gains() { // which clusters gained and which lost, when nothing is chosen
    const hint = make("p", {}, "Click a point for its neighbors, shift-drag a lasso, or find an image or a class.");
    const c = colours[s.colour];
    const by = c.names && c.codes && c.names.length > 1 ? c : labels && colours.class;
    if (!complete || !by) return [hint];
    const rows = once(`gains ${by.name} ${at(0)} ${at(1)}`, () => by.names.map((name, code) => {
      const some = members(by.codes, code), changed = 1 - mean(some.map((i) => shared()[i])) / k;
      const [a, b] = labels ? [0, 1].map((side) => mean(some.map((i) => rights(side)[i])) / k) : [0, 0];
      const example = some.reduce((x, i) => (shared()[i] < shared()[x] ? i : x), some[0]);
      return { name, code, some, changed, a, b, example };
    }).filter((row) => row.some.length).sort((x, y) => y.b - y.a - (x.b - x.a) || y.changed - x.changed));
    const row = (r) => make("tr", {}, make("td", {}, picture(r.example, 24)),
      make("td", {}, button(r.name, "choose the group", () => group(r.some))),
      ...(labels ? [make("td", {}, `${percent(r.a)} → ${percent(r.b)}`)] : []), make("td", {}, percent(r.changed)));
    const few = rows.length <= 8 || all ? [rows] : [rows.slice(0, 4), rows.slice(-4)];
    const rest = make("tr", {}, make("td", {}), make("td", { colspan: 3 }, button(`${rows.length - 8} between`, "show all",
      () => ((all = true), inspect()))));
    const head = make("tr", {}, ...["", by.name, ...(labels ? ["same class"] : []), "changed"].map((x) => make("th", {}, x)));
    return [hint, make("b", {}, labels ? "Gained most, and least" : "Changed most"),
      make("table", { class: "rx-gains" }, head, ...few[0].map(row), ...(few[1] ? [rest, ...few[1].map(row)] : []))];
  }
  function key() {
    const c = coloured(0);
    const axes = make("small", {}, `${s.layout === "umap" ? "UMAP" : "PCA"} 1 and 2 (axes have no meaning; each block fits its own range)`);
    if (!c.names) {
      const bar = make("span", { class: "rx-scale" });
      bar.style.background = `linear-gradient(90deg,${c.palette.filter((_, i) => i % 32 === 0).join()})`;
      return legend.replaceChildren(make("span", { class: "rx-unit" }, `${c.label}: ${c.limits[0]} `, bar, ` ${c.limits[1]}`), axes);
    }
    const counts = once(`counts ${c.key}`, () => {
      const found = new Uint32Array(c.names.length);
      for (const code of c.codes) found[code]++;
      return found;
    });
    const chips = c.names.map((name, code) => {
      const count = counts[code], icon = drawn("svg", { viewBox: "-6 -6 12 12", width: 13, height: 13 });
      icon.append(drawn("path", { d: outlineOf(c.marks[code % c.marks.length]), fill: c.palette[code % c.palette.length] }));
      const chip = make("button", { type: "button", class: "rx-chip", title: `show ${name} alone`, "data-code": code,
        "aria-pressed": only === code, onclick: () => ((only = only === code ? null : code), update()) },
        icon, ` ${name} ${count.toLocaleString("en")}`);
      return count ? chip : null;
    });
    legend.replaceChildren(...(c.names.length > 1 ? chips.filter(Boolean) : []), axes);
  }
  const outlineOf = (name) => ({
    circle: "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0", square: "M-4-4h8v8h-8z", triangle: "M0-5L5 4H-5z",
    diamond: "M0-5.5L5.5 0 0 5.5-5.5 0z", down: "M0 5L5-4H-5z", plus: "M-5-1.7h3.3v-3.3h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3z",
    cross: "M-4.7-2.4l2.3-2.3L0-2.3 2.4-4.7l2.3 2.3L2.3 0l2.4 2.4-2.3 2.3L0 2.3l-2.4 2.4-2.3-2.3L-2.3 0z",
  })[name];
  function controls() {
    for (const one of bar.querySelectorAll("select")) {
      const options = { left: pick, right: pick, layout: layouts, colour: t.colours.map((c) => [c.name, c.name]),
        right_block: [[0, null], ...blocks] }[one.dataset.key];
      one.selectedIndex = options.findIndex(([, value]) => value === (s[one.dataset.key] ?? null));
    }
  }
  function update() {
    if (colour !== s.colour) [only, colour] = [null, s.colour];
    controls();
    for (const m of maps) {
      const [name, b] = at(m.side), { accuracy, kept } = models[name];
      const about = [title(m.side), accuracy && `k-NN accuracy ${percent(accuracy[b])}`,
        b + 1 < kept.length && `neighbors kept to the last block ${percent(kept[b])}`].filter(Boolean);
      m.caption.replaceChildren(make("b", {}, about[0]), ...about.slice(1).map((text) => ` · ${text}`));
      m.canvas.setAttribute("aria-label", `Map of ${title(m.side)}: ${n} images. Arrow keys step through images, + and - zoom, Escape clears.`);
      moved(m);
    }
    last = performance.now();
    paint(); steps(); inspect(); key();
  }

  source.changed = (state) => (s = { ...state }, update());
  source.more = (tables) => (known.clear(), read(tables));
  source.found = (asked, ids) => (known.set(`near ${asked.join(" ")}`, ids), update(), s.selected === asked[2] && tell(verdict(s.selected)));
  source.tell = tell;
  const again = () => (measure(), paint(), steps());
  new ResizeObserver(again).observe(root);
  new MutationObserver(again).observe(document.body, { attributes: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  playOn(false);
  measure();
  update();
  root.explorer = { get state() { return s; }, at: (side, i) => { // for tests: where on the page an image is
    const box = maps[side].canvas.getBoundingClientRect();
    return [box.left + maps[side].px[2 * i], box.top + maps[side].px[2 * i + 1]];
  } };
}

// In a notebook: the state is the widget's, pictures and rare neighbors come from the kernel.
function render({ model, el }) {
  const made = {}, waiting = new Set();
  const fill = (i, one) => (one.style.backgroundImage = `url(${made[i]})`);
  const source = {
    live: true, tables: model.get("tables"), state: model.get("state"),
    push: (state) => (model.set("state", state), model.save_changes()),
    ask: (message) => model.send(message),
    show(i, one) {
      if (made[i]) return fill(i, one);
      if (!waiting.size) setTimeout(() => (model.send({ pictures: [...waiting] }), waiting.clear()));
      waiting.add(i);
    },
  };
  explorer(el, source);
  model.on("change:state", () => source.changed(model.get("state")));
  model.on("change:tables", () => source.more(model.get("tables")));
  model.on("change:message", () => source.tell(...model.get("message")));
  model.on("msg:custom", (message) => {
    for (const [i, address] of Object.entries(message.pictures || {})) {
      made[i] = address;
      el.querySelectorAll(`[data-image="${i}"]`).forEach((one) => fill(i, one));
    }
    if (message.near) source.found(message.near, message.ids);
    if (message.file) save(message.file, message.address), source.tell(`Saved as ${message.file}`);
  });
}
export default { render };

// In a file: everything is in the page, and pictures are parts of one sheet.
globalThis.openExplorer = (el, { tables, state, sheet }) => explorer(el, {
  tables, state, push() {}, ask() {},
  show(i, one, size) {
    const q = size / sheet.size;
    one.style.backgroundImage = `url(${sheet.address})`;
    one.style.backgroundSize = `${sheet.width * q}px auto`;
    one.style.backgroundPosition = `${-size * (i % sheet.columns)}px ${-size * Math.floor(i / sheet.columns)}px`;
  },
});
