"use strict";
// Draws the charts of the page with uPlot, from the JSON in #chart-data. Text of a run is inserted as text, never as HTML.
(() => {
  const data = JSON.parse(document.getElementById("chart-data").textContent);
  const charts = new Map(); // figure -> state of its chart
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const UNITS = [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]];
  const DASHES = [[], [6, 4], [2, 3], [10, 4, 2, 4]];
  // Steps are whole, so ticks of their axis have whole distances: 1, 2, 5, 10, ...
  const STEP_DISTANCES = [1, 2, 5].flatMap((n) => Array.from({length: 13}, (_, p) => n * 10 ** p)).sort((a, b) => a - b);

  // Formats a measured value as `four_digits` in tracking/readable.py does.
  function fourDigits(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size > 0 && size < 1e-3) return value.toExponential(2).replace(/e([+-])(\d)$/, (_, sign, digit) => "e" + sign + "0" + digit);
    if (size < 100) return trimmed(value, 4);
    if (size < 1e6) return Math.round(value).toLocaleString("en-US");
    const [unit, least] = UNITS.find(([, least]) => size >= least);
    return (value / least).toFixed(2) + " " + unit;
  }

  // Formats the value of a tick.
  function tickText(value) {
    if (value === null) return "";
    const size = Math.abs(value);
    for (const [unit, least] of UNITS) if (size >= least && size >= 1e4) return trimmed(value / least, 4) + " " + unit;
    if (size > 0 && size < 1e-4) return value.toExponential(2).replace(/\.?0+e/, "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : trimmed(value, 4);
  }
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));

  // Maps a step to tokens or hours, by interpolation between knots.
  function interpolate(knots, step) {
    const {x, y} = knots;
    let low = 0, high = x.length - 1;
    if (step <= x[0]) return y[0];
    if (step >= x[high]) return y[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] <= step) low = middle; else high = middle;
    }
    return y[low] + (y[high] - y[low]) * (step - x[low]) / (x[high] - x[low]);
  }

  function axisOf(section) {
    const pressed = (query) => section.querySelector(query + "[aria-pressed=true]");
    return {x: pressed("[data-x]")?.dataset.x ?? "step", logX: !!pressed("[data-log=x]"), logY: !!pressed("[data-log=y]")};
  }

  // Returns [x, y] of a curve on the chosen axis. Steps without a position on it are left out.
  function pointsOn(line, part, axis) {
    const steps = data.steps[part.x], knots = axis.x === "step" ? null : data.runs[line.run][axis.x];
    if (axis.x !== "step" && !knots) return [[], []];
    const xs = [], ys = [];
    steps.forEach((step, index) => {
      let x = knots ? interpolate(knots, step) : step;
      if (axis.x === "hours") x *= 60;
      if (axis.logX && !(x > 0)) return;
      if (xs.length && x <= xs[xs.length - 1]) return;
      xs.push(x);
      ys.push(part.y[index]);
    });
    return [xs, ys];
  }

  const xWords = {step: (x) => "step " + x.toLocaleString("en-US"), tokens: (x) => fourDigits(x) + " tokens", hours: minutes};
  function minutes(x) {
    if (x >= 120) return trimmed(x / 60, 3) + " h";
    return x >= 2 || x === 0 ? trimmed(x, 3) + " min" : trimmed(x * 60, 3) + " s";
  }

  // Returns the ticks of a logarithmic axis: 1 2 5 of every decade; even distances if the axis spans less than a decade.
  function logTicks(low, high) {
    if (high / low < 10) {
      const step = [1, 2, 5, 10].map((n) => n * 10 ** Math.floor(Math.log10((high - low) / 4))).find((n) => (high - low) / n <= 6);
      const ticks = [];
      for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(Number((n * step).toPrecision(12)));
      return ticks;
    }
    const decades = Math.log10(high / low), ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const n of decades > 2 ? [1] : [1, 2, 5]) {
        const tick = n * 10 ** power;
        if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(Number(tick.toPrecision(12)));
      }
    }
    return decades > 8 ? ticks.filter((_, index) => index % Math.ceil(decades / 6) === 0) : ticks;
  }

  const logAxis = {splits: (u, i, low, high) => logTicks(low, high), filter: (u, splits) => splits};

  // Ranges of the axes: a single value gets some room on both sides, and a curve near zero starts at zero.
  function xRange(log) {
    return (u, low, high) => {
      if (low !== high) return [low, high];
      return log ? [low / 2, high * 2] : [low - 1, high + 1];
    };
  }

  function yRange(log) {
    return (u, low, high) => {
      if (low === null) return [0, 1];
      if (log) return [low / (high / low) ** 0.05 / (low === high ? 1.1 : 1), high * (high / low) ** 0.05 * (low === high ? 1.1 : 1)];
      if (low === high) return low === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
      const room = (high - low) * 0.06;
      return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
    };
  }

  // Draws the chart of a figure with the axes that the toolbar of its section selects.
  function build(figure) {
    const chart = data.charts[Number(figure.dataset.chart)], section = figure.closest("section");
    const axis = axisOf(section), logY = axis.logY && chart.positive;
    charts.get(figure)?.plot?.destroy();

    const plotAt = figure.querySelector(".plot"), width = Math.floor(plotAt.clientWidth);
    if (!width) return; // a closed group has no width; it is drawn when it opens

    // A curve with a trend is thin and pale, and its trend bold.
    const tables = [], series = [{}], rows = [];
    for (const line of chart.lines) {
      const colour = "--c" + line.colour % 8, dash = DASHES[Math.floor(line.colour / 8) % DASHES.length];
      const [xs, ys] = pointsOn(line, line, axis);
      if (!xs.length) continue;
      const row = {label: line.label, colour, dashed: dash.length > 0, indices: [series.length], hidden: false};
      tables.push([xs, ys]);
      series.push({
        stroke: () => css(colour),
        width: line.trend ? 1 : 1.75,
        alpha: line.trend ? 0.38 : 1,
        dash,
        points: {show: xs.length < 40, size: 5, fill: () => css(colour)},
      });
      if (line.trend) {
        row.indices.push(series.length);
        tables.push(pointsOn(line, line.trend, axis));
        series.push({stroke: () => css(colour), width: 2, dash, points: {show: false}});
      }
      rows.push(row);
    }

    const legend = figure.querySelector(".legend");
    legend.replaceChildren();
    if (!rows.length) {
      plotAt.replaceChildren(Object.assign(document.createElement("p"), {className: "empty", textContent: "Not measured on this axis: choose steps."}));
      charts.set(figure, {});
      return;
    }
    plotAt.replaceChildren();

    // uPlot needs one list of x for all curves.
    const aligned = uPlot.join(tables);
    const state = {rows, axis, logY, aligned};
    const look = {
      font: "12px system-ui, sans-serif",
      stroke: () => css("--muted"),
      grid: {stroke: () => css("--grid"), width: 1},
      ticks: {show: false},
    };
    const measure = document.createElement("canvas").getContext("2d");
    measure.font = look.font;
    const textWidth = (text) => measure.measureText(text ?? "").width;

    state.plot = new uPlot({
      width,
      height: figure.parentElement.classList.contains("first") ? 240 : 200,
      padding: [10, 14, 0, 0],
      legend: {show: false},
      cursor: {
        y: false,
        sync: {key: section.id + axis.x, setSeries: false},
        points: {size: 7},
        drag: {x: true, y: false, setScale: true},
        dataIdx: nearest(aligned),
      },
      scales: {
        x: {time: false, distr: axis.logX ? 3 : 1, log: 10, range: xRange(axis.logX)},
        y: {distr: logY ? 3 : 1, log: 10, range: yRange(logY)},
      },
      axes: [
        {
          ...look,
          size: 30,
          gap: 6,
          space: 52,
          ...(axis.logX ? logAxis : {}),
          incrs: axis.x === "step" ? STEP_DISTANCES : undefined,
          values: (u, splits) => splits.map((x) => (axis.x === "hours" ? minutes(x) : tickText(x))),
        },
        {
          ...look,
          gap: 6,
          space: 36,
          size: (u, values) => Math.ceil(Math.max(24, ...(values ?? []).map(textWidth)) + 12),
          ...(logY ? logAxis : {}),
          values: (u, splits) => splits.map(tickText),
        },
      ],
      series,
      hooks: {setCursor: [(u) => showValues(figure, u.cursor.idxs)]},
    }, aligned, plotAt);

    for (const row of rows) {
      const item = document.createElement("button"), dot = document.createElement("i");
      item.type = "button";
      item.setAttribute("aria-pressed", "true");
      item.title = "hide or show " + row.label;
      dot.className = "dot c" + row.colour.slice(3) + (row.dashed ? " ring" : "");
      row.value = document.createElement("b");
      item.append(dot, document.createTextNode(rows.length > 1 ? row.label + " " : ""), row.value);
      item.addEventListener("click", () => {
        row.hidden = !row.hidden;
        item.setAttribute("aria-pressed", String(!row.hidden));
        for (const index of row.indices) state.plot.setSeries(index, {show: !row.hidden});
      });
      legend.append(item);
    }

    state.at = Object.assign(document.createElement("span"), {className: "at"});
    legend.append(state.at);
    charts.set(figure, state);
    showValues(figure, null);
  }

  // Finds the index of a curve's value next to the cursor: a curve does not have a value at every x of the chart.
  function nearest(aligned) {
    return (u, series, index, x) => {
      const values = aligned[series], xs = aligned[0];
      if (!series || (values[index] !== undefined && values[index] !== null)) return index;

      let low = index, high = index;
      while (low >= 0 && (values[low] === undefined || values[low] === null)) low--;
      while (high < values.length && (values[high] === undefined || values[high] === null)) high++;
      if (low < 0) return high < values.length ? high : null;
      if (high >= values.length) return low;
      return x - xs[low] <= xs[high] - x ? low : high;
    };
  }

  // Writes the values at the cursor to the legend; without a cursor, the last ones.
  function showValues(figure, indices) {
    const state = charts.get(figure);
    if (!state?.at) return;
    const {rows, aligned, axis} = state;

    let at = null;
    for (const row of rows) {
      const values = aligned[row.indices[0]];
      let index = indices?.[row.indices[0]];
      if (index === null || index === undefined) {
        index = values.length - 1;
        while (index > 0 && (values[index] === null || values[index] === undefined)) index--;
      } else at = aligned[0][index];
      row.value.textContent = fourDigits(values[index]);
    }

    state.at.textContent = at === null ? "last" : xWords[axis.x](at);
  }

  const figures = [...document.querySelectorAll("figure.chart")];
  const draw = (within) => figures.filter((figure) => within.contains(figure)).forEach(build);

  for (const toolbar of document.querySelectorAll(".toolbar")) {
    const section = toolbar.closest("section");
    const lines = figures.filter((figure) => section.contains(figure)).flatMap((figure) => data.charts[Number(figure.dataset.chart)].lines);
    for (const button of toolbar.querySelectorAll("button")) {
      const axis = button.dataset.x;
      if (axis && axis !== "step") button.disabled = !lines.some((line) => data.runs[line.run][axis]);
      button.addEventListener("click", () => {
        if (axis) for (const other of toolbar.querySelectorAll("[data-x]")) other.setAttribute("aria-pressed", String(other === button));
        else button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
        draw(section);
      });
    }
  }
  for (const group of document.querySelectorAll("details")) {
    group.addEventListener("toggle", () => group.open && figures.filter((figure) => group.contains(figure) && !charts.get(figure)?.plot).forEach(build));
  }
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // only the height changes when a telephone hides its address bar
    width = innerWidth;
    for (const [figure, state] of charts) {
      const room = figure.querySelector(".plot").clientWidth;
      if (state.plot && room) state.plot.setSize({width: Math.floor(room), height: state.plot.height});
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((state) => state.plot?.redraw(false)));

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, {rootMargin: "-20% 0px -75% 0px"});
  for (const id of links.keys()) observer.observe(document.getElementById(id));

  draw(document.body);
  document.documentElement.dataset.drawn = "true"; // a test waits for it
})();
