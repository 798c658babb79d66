
"use strict";
// The page of `dsmr profile`: tables that sort by a click, and charts with the values under the pointer.
(() => {
  // --- Tables: by the figure that a cell stands for; what has none comes last, whichever way.

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };

  function sort(table, column, head) {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column]?.dataset.value;
    const rows = [...table.tBodies[0].rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return down ? compare(b, a) : compare(a, b);
    });
    table.tBodies[0].append(...rows);
  }

  for (const table of document.querySelectorAll("table")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => sort(table, column, head));
    });
  }

  // --- Charts

  const svg = (name, attributes, parent, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent?.append(element);
    return element;
  };
  const figure = (value) => value === 0 ? "0" : value >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(3)));
  const withUnit = (value, axis) => `${figure(value)}${axis.unit ? " " + axis.unit : ""}`;
  const named = (axis) => `${axis.label}${axis.unit ? ` (${axis.unit})` : ""}${axis.note ? `: ${axis.note}` : ""}`;

  function ticks(low, high, log) {
    if (log) {
      const base = high / low > 200 ? 10 : 2;
      const first = Math.ceil(Math.log(low) / Math.log(base) - 1e-9), last = Math.floor(Math.log(high) / Math.log(base) + 1e-9);
      return Array.from({length: last - first + 1}, (_, i) => base ** (first + i));
    }
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
    const first = Math.ceil(low / step), last = Math.floor(high / step + 1e-9);
    return Array.from({length: last - first + 1}, (_, i) => (first + i) * step);
  }

  function scale(values, log, begin, end, room) {
    let low = Math.min(...values), high = Math.max(...values);
    if (log) {
      const factor = 1 + room;
      [low, high] = [low / factor, high * factor];
    } else {
      const more = room * (high - low || high || 1);
      [low, high] = [Math.max(low - more, low >= 0 ? 0 : low - more), high + more];
    }
    const place = log ? (v) => Math.log(v / low) / Math.log(high / low) : (v) => (v - low) / (high - low);
    const at = (v) => begin + (end - begin) * place(v);
    return {at, ticks: ticks(low, high, log)};
  }

  // Width, height and the space of the axes' labels; the drawing area is what is left.
  const box = (width) => ({width, height: Math.max(240, Math.min(420, width * .6)), left: 64, right: 12, top: 24, bottom: 44});

  function frame(chart, size, x, y) {
    const root = svg("svg", {width: size.width, height: size.height, viewBox: `0 0 ${size.width} ${size.height}`, role: "img", tabindex: 0, "aria-label": `${chart.title}. Arrow keys go through the values.`});
    for (const value of y.ticks) {
      svg("line", {class: "grid", x1: size.left, x2: size.width - size.right, y1: y.at(value), y2: y.at(value)}, root);
      svg("text", {x: size.left - 6, y: y.at(value) + 4, "text-anchor": "end"}, root, figure(value));
    }
    let free = -Infinity; // ticks that would touch their neighbour are left out
    for (const {at, text} of x) {
      const half = 4 * text.length;
      if (at - half < free) continue;
      svg("text", {x: at, y: size.height - size.bottom + 18, "text-anchor": "middle"}, root, text);
      free = at + half + 6;
    }
    const middle = (size.left + size.width - size.right) / 2;
    svg("text", {x: middle, y: size.height - 6, "text-anchor": "middle"}, root, named(chart.x));
    svg("text", {x: 4, y: 12}, root, named(chart.y));
    return root;
  }

  function lines(chart, width) {
    const size = box(width), points = chart.series.flatMap((series) => series.points);
    const x = scale(points.map((p) => p[0]), chart.x.log, size.left, width - size.right, .08);
    const y = scale(points.map((p) => p[1]), chart.y.log, size.height - size.bottom, size.top, .15);
    const root = frame(chart, size, x.ticks.map((v) => ({at: x.at(v), text: figure(v)})), y), hits = [];
    for (const {name, mark, points, colour} of chart.series) {
      const group = svg("g", {class: `k${colour}`}, root);
      const places = points.map(([a, b]) => [x.at(a), y.at(b)]);
      if (mark !== "points") {
        const path = places.map(([a, b], i) => i === 0 ? `M${a},${b}` : mark === "steps" ? `V${b}H${a}` : `L${a},${b}`);
        svg("path", {class: "line", d: path.join("")}, group);
      }
      points.forEach(([a, b, label], i) => {
        if (mark !== "steps") svg("circle", {class: "fill", cx: places[i][0], cy: places[i][1], r: mark === "points" ? 5 : 3}, group);
        const head = `${label ? label + ", " : ""}${name}`;
        const text = `${chart.x.label}: ${withUnit(a, chart.x)}\n${chart.y.label}: ${withUnit(b, chart.y)}`;
        if (mark === "steps") return;
        const same = hits.find((hit) => Math.hypot(hit.x - places[i][0], hit.y - places[i][1]) < 3);
        if (same) same.head += `\n${head}`;
        else hits.push({x: places[i][0], y: places[i][1], head, text});
      });
    }
    return {root, hits, keys: chart.series};
  }

  function bars(chart, width) {
    const size = box(width), marks = chart.marks;
    const sums = chart.categories.map((_, i) => chart.series.reduce((sum, series) => sum + series.values[i], 0));
    const y = scale([0, ...sums, ...(marks?.values ?? [])], false, size.height - size.bottom, size.top, .05);
    const step = (width - size.left - size.right) / chart.categories.length;
    const middle = (i) => size.left + (i + .5) * step, wide = Math.min(.7 * step, 90);
    const root = frame(chart, size, chart.categories.map((text, i) => ({at: middle(i), text})), y), hits = [];
    chart.categories.forEach((category, i) => {
      let sum = 0;
      const said = [];
      for (const {name, values, colour, pale} of chart.series) {
        const top = y.at(sum + values[i]), bottom = y.at(sum);
        svg("rect", {class: `fill k${colour}${pale ? " pale" : ""}`, x: middle(i) - wide / 2, width: wide, y: top, height: Math.max(bottom - top, 0)}, root);
        said.push(`${name}: ${withUnit(values[i], chart.y)}`);
        sum += values[i];
      }
      if (marks) {
        const level = y.at(marks.values[i]);
        svg("line", {class: "mark", x1: middle(i) - wide / 2 - 4, x2: middle(i) + wide / 2 + 4, y1: level, y2: level}, root);
        said.push(`${marks.name}: ${withUnit(marks.values[i], chart.y)}`);
      }
      hits.push({x: middle(i), y: y.at(sum), head: `layer ${category}: ${withUnit(sums[i], chart.y)}`, text: said.join("\n"), wide: step});
    });
    return {root, hits, keys: marks ? [...chart.series, {name: `${marks.name} (line)`, colour: 7}] : chart.series};
  }

  const tip = document.getElementById("tip");

  function show(root, hit) {
    root.querySelector(".cursor, .band")?.remove();
    tip.hidden = !hit;
    if (!hit) return;
    if (hit.wide) svg("rect", {class: "band", x: hit.x - hit.wide / 2, width: hit.wide, y: 24, height: root.height.baseVal.value - 68}, root);
    else svg("circle", {class: "cursor", cx: hit.x, cy: hit.y, r: 7}, root);
    const head = document.createElement("b");
    head.textContent = hit.head;
    tip.replaceChildren(head, `\n${hit.text}`);
    const place = root.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(place.left + hit.x + 14, innerWidth - own.width - 6);
    tip.style.left = `${Math.max(left, 6)}px`;
    tip.style.top = `${Math.max(place.top + hit.y - own.height - 12, 6)}px`;
  }

  function listen(root, hits) {
    let current = -1;
    const near = (event) => {
      const place = root.getBoundingClientRect(), [a, b] = [event.clientX - place.left, event.clientY - place.top];
      const far = hits.map((hit) => hit.wide ? Math.max(Math.abs(hit.x - a) - hit.wide / 2, 0) : Math.hypot(hit.x - a, hit.y - b));
      const least = Math.min(...far);
      return least <= 40 ? far.indexOf(least) : -1;
    };
    const point = (event) => { current = near(event); show(root, hits[current]); };
    root.addEventListener("pointermove", point);
    root.addEventListener("pointerdown", point);
    root.addEventListener("pointerleave", () => show(root));
    root.addEventListener("blur", () => show(root));
    root.addEventListener("keydown", (event) => {
      const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
      if (by === undefined) return;
      event.preventDefault();
      current = (current + by + hits.length) % hits.length;
      show(root, hits[current]);
    });
  }

  function legend(keys) {
    const list = document.createElement("ul");
    list.className = "keys";
    for (const {name, colour, pale} of keys) {
      const item = document.createElement("li"), words = document.createElement("span");
      item.className = `k${colour}${pale ? " pale" : ""}`;
      words.textContent = name;
      item.append(words);
      list.append(item);
    }
    return list;
  }

  const charts = new Map(JSON.parse(document.getElementById("charts").textContent).map((chart) => [chart.name, chart]));
  for (const place of document.querySelectorAll("[data-chart]")) {
    const chart = charts.get(place.dataset.chart);
    let drawn = 0;
    const draw = () => {
      const width = Math.floor(place.clientWidth);
      if (!width || width === drawn) return;
      drawn = width;
      const {root, hits, keys} = (chart.kind === "bars" ? bars : lines)(chart, width);
      listen(root, hits);
      place.querySelectorAll("svg, .keys").forEach((old) => old.remove());
      place.append(root, legend(keys));
    };
    draw();
    new ResizeObserver(draw).observe(place);
  }
})();
