"use strict";
(() => {
  const byId = (name) => document.getElementById(`explorer-${name}`);
  const data = JSON.parse(byId("data").textContent);
  const { stops, rows, methods, settings, bars } = data;
  const slider = byId("ratio");
  const COLOURS = ["c1", "c2", "c3", "c4", "c5", "c6"];
  const MARKS = ["circle", "square", "triangle", "diamond"];
  const LARGEST_FILE = 32e6;
  const overlays = [];

  // Numbers read as they do on the rest of the page.
  const figures = (value) => {
    if (!Number.isFinite(value)) return "not measured";
    const far = Math.abs(value);
    if (far >= 999.5) return Math.round(value).toLocaleString("en-US");
    if (far && far < 1e-4) {
      const [mantissa, exponent] = value.toExponential(2).split("e");
      return `${Number(mantissa)}e${Number(exponent)}`;
    }
    return String(Number(value.toPrecision(3)));
  };
  const size = (value) => {
    if (value < 1000) return `${value.toFixed(0)} B`;
    if (value < 999500) return `${(value / 1e3).toPrecision(3)} kB`;
    const [unit, scale] = value < 999.95e6 ? ["MB", 1e6] : value < 999.95e9 ? ["GB", 1e9] : ["TB", 1e12];
    return `${(value / scale).toFixed(value / scale < 99.995 ? 2 : 1)} ${unit}`;
  };
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
  const whole = (value) => value.toLocaleString("en-US");
  const sites = (number) => (number === 1 ? "1 site" : `${whole(number)} sites`);
  const total = (values) => values.reduce((sum, value) => sum + value, 0);

  const colour = (method) => `var(--${COLOURS[method % COLOURS.length]})`;
  const made = (tag, kind, ...parts) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    element.append(...parts);
    return element;
  };
  const drawn = (tag, attributes, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const state = (name, value, text) => {
    byId(name).value = String(value);
    byId(name).textContent = text;
  };
  // A name may be broken after its dots.
  const dotted = (name) => {
    const code = made("code", "");
    name.split(/(?<=\.)/).forEach((part, place) => code.append(...(place ? [made("wbr", ""), part] : [part])));
    return code;
  };

  const track = (parts, label) => {
    const line = made("span", "track");
    for (const [share, fill] of parts.filter((part) => part[0] > 0)) {
      const piece = made("i", "");
      piece.style.width = `${(100 * share).toFixed(2)}%`;
      piece.style.background = fill;
      line.append(piece);
    }
    return made("div", "bar", line, made("span", "figure", label));
  };
  const heads = () => made("div", "row heads", ...["", "Bytes", "Expected loss"].map((text) => made("span", "", text)));
  const row = (name, ...tracks) => made("div", "row", made("div", "name", ...name), ...tracks);

  // The same rows at every stop, so that nothing jumps while the slider moves.
  const taken = methods.map((_, method) => total(stops.map((stop) => total(stop.cells.map((cell) => (cell[1] === method ? cell[4] : 0))))));
  const order = [...methods.keys()].sort((one, other) => taken[other] - taken[one]);
  const drawMethods = (stop) => {
    const sums = methods.map(() => [0, 0, 0]);
    for (const [, method, , number, bytes, loss] of stop.cells) {
      sums[method][0] += number;
      sums[method][1] += bytes;
      sums[method][2] += loss;
    }
    const every = total(sums.map((sum) => sum[1])) + data.fixed;
    const lost = total(sums.map((sum) => sum[2]));
    byId("methods").replaceChildren(
      heads(),
      ...order.map((method) => {
        const [number, bytes, loss] = sums[method];
        return row(
          [methods[method], " ", made("small", "", sites(number))],
          track([[bytes / every, colour(method)]], `${size(bytes)} · ${percent(bytes, every)}`),
          track([[lost ? loss / lost : 0, colour(method)]], `${figures(loss)} · ${percent(loss, lost)}`),
        );
      }),
      row(
        ["the rest ", made("small", "", "what is not a site")],
        track([[data.fixed / every, "var(--muted)"]], `${size(data.fixed)} · ${percent(data.fixed, every)}`),
        track([], "–"),
      ),
    );
  };

  const members = bars.map((_, bar) => total(rows.filter((each) => each.bar === bar).map((each) => each.sites)));
  const drawSites = (stop) => {
    const parts = bars.map(() => new Map());
    const losses = bars.map(() => 0);
    for (const [place, method, , , bytes, loss] of stop.cells) {
      const bar = rows[place].bar;
      parts[bar].set(method, (parts[bar].get(method) ?? 0) + bytes);
      losses[bar] += loss;
    }
    const bytes = parts.map((part) => total([...part.values()]));
    const [most, worst] = [Math.max(...bytes), Math.max(...losses)];
    const [every, lost] = [total(bytes), total(losses)];
    byId("sites").replaceChildren(
      heads(),
      ...bars.map((name, bar) => {
        const pieces = [...parts[bar]].sort((one, other) => one[0] - other[0]);
        const count = members[bar] > 1 && !name.startsWith("the rest: ") ? [" ", made("small", "", `×\u00a0${members[bar]}`)] : [];
        return row(
          [name.startsWith("the rest: ") ? name : dotted(name), ...count],
          track(pieces.map(([method, part]) => [part / most, colour(method)]), `${size(bytes[bar])} · ${percent(bytes[bar], every)}`),
          track([[worst ? losses[bar] / worst : 0, "var(--muted)"]], `${figures(losses[bar])} · ${percent(losses[bar], lost)}`),
        );
      }),
    );
  };

  const drawEvery = (stop) => {
    if (!byId("every").open) return;
    const cell = (label, ...parts) => {
      const found = made("td", "", ...parts);
      found.dataset.label = label;
      return found;
    };
    const lines = stop.cells.map(([place, method, setting, number, bytes, loss]) => {
      const head = made("th", "", dotted(rows[place].name));
      head.scope = "row";
      if (rows[place].sites > 1) head.append(" ", made("small", "", `${number} of ${sites(rows[place].sites)}`));
      return made(
        "tr", "", head, cell("Method", methods[method]), cell("Setting", settings[setting] ?? "–"),
        cell("Bytes", size(bytes)), cell("Expected loss", figures(loss)),
      );
    });
    byId("every").querySelector("tbody").replaceChildren(...lines);
  };

  // The curve: ratio and loss, both in logarithms.
  const ratioOf = (bytes) => data.original / bytes;
  const ticks = (low, high, most) => {
    for (const steps of [[1, 1.5, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const step of steps) {
          const tick = step * 10 ** power;
          if (tick >= low * 0.999 && tick <= high * 1.001) found.push(tick);
        }
      if (found.length <= most || steps.length === 1) return found.filter((_, place) => place % Math.ceil(found.length / most) === 0);
    }
  };
  const mark = (kind, x, y, radius, attributes) => {
    if (kind === "circle") return drawn("circle", { cx: x, cy: y, r: radius, ...attributes });
    const corners = {
      square: [[-1, -1], [1, -1], [1, 1], [-1, 1]],
      triangle: [[0, -1.2], [1.15, 0.9], [-1.15, 0.9]],
      diamond: [[0, -1.35], [1.35, 0], [0, 1.35], [-1.35, 0]],
      star: [...Array(10)].map((_, turn) => {
        const far = turn % 2 ? 0.7 : 1.7;
        return [far * Math.sin((turn * Math.PI) / 5), -far * Math.cos((turn * Math.PI) / 5)];
      }),
    }[kind];
    const points = corners.map(([right, down]) => `${x + radius * right},${y + radius * down}`).join(" ");
    return drawn("polygon", { points, ...attributes });
  };
  const look = (place) => [colour(place), MARKS[place % MARKS.length]];

  let place = null;
  const drawCurve = () => {
    const frame = byId("curve");
    const width = Math.max(frame.clientWidth, 280);
    const height = width < 500 ? 260 : 340;
    const [left, right, top, bottom] = [60, 14, 14, 40];
    const series = overlays.flatMap((overlay) => [...overlay.line, ...overlay.marks]);
    const points = [
      ...stops.map((stop) => [stop.ratio, stop.expected]),
      ...series.map(([bytes, loss]) => [ratioOf(bytes), loss]),
      ...(data.measured ? [data.measured] : []),
    ];
    const positive = points.map((point) => point[1]).filter((loss) => loss > 0);
    const floor = (positive.length ? Math.min(...positive) : 1e-6) / 2;
    const [near, far] = [Math.min(...points.map((point) => point[0])), Math.max(...points.map((point) => point[0]))];
    const high = Math.max(...positive, floor * 4) * 1.5;
    const x = (ratio) => left + ((width - left - right) * Math.log(ratio / near)) / (Math.log(far / near) || 1);
    const y = (loss) => top + ((height - top - bottom) * Math.log(high / Math.max(loss, floor))) / Math.log(high / (floor / 1.2));
    place = { x, y, top, floor: height - bottom };
    const svg = drawn("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
    const label = { "font-size": 12, fill: "var(--muted)" };
    for (const tick of ticks(floor, high, 7)) {
      svg.append(drawn("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), stroke: "var(--rule)" }));
      svg.append(drawn("text", { x: left - 8, y: y(tick) + 4, "text-anchor": "end", ...label }, figures(tick)));
    }
    for (const tick of ticks(near, far, width < 500 ? 6 : 11)) {
      svg.append(drawn("line", { x1: x(tick), x2: x(tick), y1: top, y2: height - bottom, stroke: "var(--rule)" }));
      svg.append(drawn("text", { x: x(tick), y: height - bottom + 18, "text-anchor": "middle", ...label }, `${figures(tick)}×`));
    }
    svg.append(drawn("text", { x: width - right, y: height - 4, "text-anchor": "end", ...label }, "times smaller than the original"));
    const line = (points, attributes) => {
      const shown = points.map(([ratio, loss]) => `${x(ratio).toFixed(1)},${y(loss).toFixed(1)}`).join(" ");
      svg.append(drawn("polyline", { points: shown, fill: "none", "stroke-width": 1.8, ...attributes }));
    };
    overlays.forEach((overlay, number) => {
      const [fill, kind] = look(number);
      const sorted = [...overlay.line].sort((one, other) => other[0] - one[0]);
      if (sorted.length) line(sorted.map(([bytes, loss]) => [ratioOf(bytes), loss]), { stroke: fill, "stroke-dasharray": "6 4" });
      for (const [bytes, loss] of overlay.marks) svg.append(mark(kind, x(ratioOf(bytes)), y(loss), 5, { fill, class: "peer" }));
    });
    line(stops.map((stop) => [stop.ratio, stop.expected]), { stroke: "var(--ink)" });
    if (data.measured) svg.append(mark("star", x(data.measured[0]), y(data.measured[1]), 5, { fill: "var(--accent)" }));
    svg.append(drawn("line", { class: "here", stroke: "var(--accent)", "stroke-dasharray": "2 3" }));
    svg.append(drawn("circle", { class: "here", r: 7, fill: "none", stroke: "var(--accent)", "stroke-width": 2.5 }));
    frame.replaceChildren(svg);
    moveMark();
  };
  const moveMark = () => {
    const stop = stops[slider.value];
    const [line, dot] = byId("curve").querySelectorAll(".here");
    const [across, down] = [place.x(stop.ratio), place.y(stop.expected)];
    for (const [name, value] of Object.entries({ x1: across, x2: across, y1: place.top, y2: place.floor })) line.setAttribute(name, value);
    dot.setAttribute("cx", across);
    dot.setAttribute("cy", down);
  };

  const swatch = (kind, fill, dashed) => {
    const svg = drawn("svg", { width: 26, height: 14, "aria-hidden": "true" });
    if (dashed !== undefined) svg.append(drawn("line", { x1: 0, x2: 26, y1: 7, y2: 7, stroke: fill, "stroke-width": 2, "stroke-dasharray": dashed }));
    if (kind) svg.append(mark(kind, 13, 7, 5, { fill }));
    return svg;
  };
  const drawLegend = () => {
    const entries = [made("li", "", swatch("", "var(--ink)", ""), "plans of this report")];
    if (data.measured) entries.push(made("li", "", swatch("star", "var(--accent)"), `this artifact, measured: ${data.measured[2]}`));
    overlays.forEach((overlay, number) => {
      const [fill, kind] = look(number);
      const remove = made("button", "", "Remove");
      remove.type = "button";
      remove.setAttribute("aria-label", `Remove ${overlay.name}`);
      remove.addEventListener("click", () => {
        overlays.splice(number, 1);
        byId("file").focus();
        redraw();
      });
      const notes = differences(overlay).map((note) => made("small", "", note));
      const dashed = overlay.line.length ? "6 4" : undefined;
      entries.push(made("li", "", swatch(overlay.marks.length ? kind : "", fill, dashed), overlay.name, ...notes, remove));
    });
    byId("legend").replaceChildren(...entries);
  };
  const differences = (overlay) => {
    const notes = [];
    if (overlay.source && overlay.source !== data.source) notes.push("of another source");
    if (overlay.target && overlay.target !== data.target) notes.push(`its bytes count for ${overlay.target}`);
    if (overlay.metric && overlay.metric !== data.metric) notes.push(`its loss is ${overlay.metric}`);
    return notes;
  };

  // Files that the reader lays over.
  const clean = (text) => String(text).replace(/\p{C}/gu, "�").slice(0, 60);
  const number = (value, name) => {
    if (typeof value !== "number" || !Number.isFinite(value) || value < 0) throw new Error(`${name} is not a number of at least 0`);
    return value;
  };
  const size_of = (value, name) => {
    if (number(value, name) === 0) throw new Error(`${name} is 0`);
    return value;
  };
  const ofReport = (report) => {
    const chosen = report.curve.chosen;
    const line = report.explorer?.stops?.length ? report.explorer.stops : report.curve.points;
    const measured = chosen.quality !== null && report.quality.lower_is_better !== false;
    return {
      name: `${clean(report.title)}, ${number(chosen.ratio, "curve.chosen.ratio").toFixed(2)}×`,
      line: line
        .filter((point) => point.expected !== null)
        .map((point) => [size_of(point.bytes, "bytes"), number(point.expected, "expected")]),
      marks: measured ? [[size_of(report.source.bytes / chosen.ratio, "bytes"), Math.max(chosen.quality, 0)]] : [],
      metric: clean(report.quality.metric),
      target: clean(report.budget.target ?? "disk"),
      source: report.source.fingerprint,
    };
  };
  const ofPoints = (points) => {
    if (!points.length) throw new Error("it is empty");
    const series = new Map();
    points.slice(0, 400).forEach((point, place) => {
      if (typeof point?.name !== "string") throw new Error(`point ${place} has no name`);
      const name = clean(point.name);
      if (!series.has(name)) series.set(name, { name, line: [], marks: [], metric: "", target: "", source: "" });
      series.get(name).marks.push([size_of(point.bytes, `bytes of point ${place}`), number(point.loss, `loss of point ${place}`)]);
    });
    return [...series.values()].slice(0, 40);
  };
  const read = async (file) => {
    if (file.size > LARGEST_FILE) throw new Error("it is too large for a report");
    let found;
    try {
      found = JSON.parse(await file.text());
    } catch {
      throw new Error("it is not JSON");
    }
    if (Array.isArray(found)) return ofPoints(found);
    try {
      return [ofReport(found)];
    } catch (error) {
      throw new Error(`it is neither a list of points nor a whole report (${error.message})`);
    }
  };
  byId("file").addEventListener("change", async (event) => {
    const told = [];
    for (const file of [...event.target.files]) {
      try {
        const found = await read(file);
        overlays.push(...found);
        told.push(`${clean(file.name)}: ${found.map((overlay) => overlay.name).join("; ")} laid over.`);
      } catch (error) {
        told.push(`${clean(file.name)} was left out: ${error.message}.`);
      }
    }
    event.target.value = "";
    byId("status").textContent = told.join(" ");
    redraw();
  });

  byId("copy").addEventListener("click", async () => {
    const said = byId("copied");
    try {
      await navigator.clipboard.writeText(byId("command").textContent);
      said.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(byId("command"));
      said.textContent = "Selected: copy it with the keyboard.";
    }
  });

  const show = () => {
    const stop = stops[slider.value];
    const used = percent(stop.bytes, stop.budget);
    byId("shown").textContent = `${stop.ratio}×`;
    byId("brief").textContent = `${size(stop.bytes)}, loss ${figures(stop.expected)}`;
    state("loss", stop.expected, figures(stop.expected));
    state("bytes", stop.bytes, size(stop.bytes));
    state("budget", stop.budget, size(stop.budget));
    byId("exact").textContent = `${whole(stop.bytes)} bytes`;
    byId("used").textContent = `${used} used`;
    // A line breaks between words alone: after a hyphen would tear options apart.
    const words = data.command.join(stop.ratio).split(" ").flatMap((word, place) => [place ? " " : "", made("span", "", word)]);
    byId("command").replaceChildren(...words);
    byId("copied").textContent = "";
    slider.setAttribute("aria-valuetext", `${stop.ratio} times smaller, ${size(stop.bytes)}, expected loss ${figures(stop.expected)}`);
    byId("back").disabled = Number(slider.value) === data.start;
    drawMethods(stop);
    drawSites(stop);
    drawEvery(stop);
    moveMark();
  };
  const redraw = () => {
    drawLegend();
    drawCurve();
  };
  byId("app").hidden = false;
  overlays.push(...data.overlays);
  redraw();
  show();
  slider.addEventListener("input", show);
  byId("every").addEventListener("toggle", () => drawEvery(stops[slider.value]));
  byId("back").addEventListener("click", () => {
    slider.value = data.start;
    slider.focus();
    show();
  });
  let drawnFor = byId("curve").clientWidth;
  new ResizeObserver(() => {
    if (byId("curve").clientWidth === drawnFor) return;
    drawnFor = byId("curve").clientWidth;
    drawCurve();
  }).observe(byId("curve"));
})();
