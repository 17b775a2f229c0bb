// Draws the charts of a report from its document; nothing here knows of buttons or of the server.
window.reportCharts = (() => {
  const SERIES = 5;
  const coarse = matchMedia("(pointer: coarse)");
  const probe = document.createElement("span");
  let palette = {};

  function readPalette() {
    probe.hidden = true;
    document.body.append(probe);
    const names = ["paper", "surface", "ink", "dim", "rule", "track", "accent", "low", "high", "over", "even", "under"];
    for (let index = 0; index < SERIES; index++) names.push(`series-${index}`);
    for (const name of names) {
      probe.style.color = `var(--${name})`;
      palette[name] = getComputedStyle(probe).color;
    }
    probe.remove();
  }

  const series = (index) => palette[`series-${Math.min(index, SERIES - 1)}`];
  const faded = (colour, share) => colour.replace("rgb(", "rgba(").replace(")", `, ${share})`);
  const scale = (low, high) => [[0, palette[low]], [1, palette[high]]];
  const width = (id) => (window.reportTheme.isPrinting ? 312 : document.getElementById(id).clientWidth);

  const largest = (lines) => Math.max(1e-9, ...lines.flat().filter((value) => value !== null));

  function layout(more) {
    const axis = {
      gridcolor: palette.rule, linecolor: palette.rule, zerolinecolor: palette.rule, tickcolor: palette.rule,
      ticks: "outside", ticklen: 4, automargin: true, title: { standoff: 8 }, showline: true,
    };
    const made = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: palette.dim },
      margin: { l: 52, r: 14, t: 12, b: 42 },
      hovermode: "x unified",
      hoverlabel: { bgcolor: palette.surface, bordercolor: palette.rule, font: { color: palette.ink, size: 12 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, bgcolor: "rgba(0,0,0,0)" },
      dragmode: coarse.matches ? false : "zoom",
      showlegend: false,
      ...more,
    };
    for (const name of ["xaxis", "yaxis"]) made[name] = { ...axis, ...(more[name] || {}) };
    return made;
  }

  // Before a page is printed it still has the width of the screen: charts take that of half a sheet, or of a whole one.
  function paper(place) {
    if (!window.reportTheme.isPrinting) return { autosize: true };
    const figure = place.closest("figure").classList;
    return { autosize: false, width: figure.contains("wide") ? 640 : 312, height: figure.contains("tall") ? 290 : figure.contains("low") ? 160 : 215 };
  }

  function draw(id, traces, more) {
    const place = document.getElementById(id);
    if (!place) return null;
    return Plotly.react(place, traces, layout({ ...more, ...paper(place) }), { displayModeBar: false, responsive: true, doubleClick: "reset" });
  }

  // Axes along which a run is told.

  function along(runs, axis) {
    if (axis === "step") return { title: "step", factor: 1, format: ",d" };
    if (axis === "tokens") return { title: "tokens", factor: 1, format: ".3s" };
    if (axis === "flops") return { title: "teraflops, a multiply-add counted once", factor: 1e-12, format: ",.3~r" };
    const longest = Math.max(1, ...runs.map((run) => run.trained_s));
    if (longest > 3 * 86400) return { title: "days trained", factor: 1 / 86400, format: ".2f" };
    if (longest > 2 * 3600) return { title: "hours trained", factor: 1 / 3600, format: ".2f" };
    if (longest > 180) return { title: "minutes trained", factor: 1 / 60, format: ".1f" };
    return { title: "seconds trained", factor: 1, format: ".0f" };
  }

  const xaxis = (unit) => ({ title: { text: unit.title, standoff: 8 }, hoverformat: unit.format, rangemode: "tozero" });
  const places = (run, axis, unit) => run.steps.places[axis].map((value) => value * unit.factor);

  function curve(run, name, axis, unit, more) {
    const found = run.steps.curves[name];
    const x = places(run, axis, unit);
    const line = {
      x, y: found.mean, type: "scatter", mode: x.length < 2 ? "markers" : "lines", name: run.label,
      line: { color: more.colour, width: 2, dash: more.dash }, marker: { color: more.colour, size: 6 },
      hovertemplate: more.hover, ...more.extra,
    };
    if (!found.low || !more.band) return [line];
    const band = { x: [...x, ...[...x].reverse()], y: [...found.high, ...[...found.low].reverse()] };
    return [{
      ...band, type: "scatter", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: faded(more.colour, 0.16),
      hoverinfo: "skip", showlegend: false,
    }, line];
  }

  function loss(runs, axis) {
    const unit = along(runs, axis), traces = [];
    runs.forEach((run, index) => traces.push(...curve(run, "loss", axis, unit, {
      colour: series(index), band: index === 0, hover: "%{y:.3f}",
    })));
    draw("plot-loss", traces, {
      xaxis: xaxis(unit), yaxis: { title: { text: "nats a token" } }, showlegend: runs.length > 1,
    });
  }

  function validation(runs, axis) {
    const unit = along(runs, axis), traces = [];
    let most = 0;
    runs.forEach((run, index) => {
      const rows = run.evaluations.filter((row) => row[axis] !== null && row[axis] !== undefined);
      most = Math.max(most, ...rows.map((row) => row[axis] * unit.factor));
      traces.push({
        x: rows.map((row) => row[axis] * unit.factor), y: rows.map((row) => row.bits_per_byte), name: run.label,
        type: "scatter", mode: "lines+markers", line: { color: series(index), width: 2 },
        marker: { size: 7, color: series(index), symbol: rows.map((row) => (row.is_final ? "diamond" : "circle")) },
        text: rows.map((row) => (row.is_final ? " (whole text)" : "")), hovertemplate: "%{y:.3f}%{text}",
      });
    });
    const baselines = Object.entries(runs[0].baselines);
    const shapes = baselines.map(([, value]) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: value, y1: value, line: { color: palette.dim, width: 1, dash: "dot" },
    }));
    const annotations = baselines.map(([name, value]) => ({
      xref: "paper", x: 1, y: value, xanchor: "right", yanchor: "bottom", text: `${name} ${value.toFixed(3)}`,
      showarrow: false, font: { size: 11, color: palette.dim },
    }));
    const values = [...traces.flatMap((trace) => trace.y), ...baselines.map(([, value]) => value)];
    const [low, high] = [Math.min(...values), Math.max(...values)];
    draw("plot-bpb", traces, {
      shapes, annotations, showlegend: runs.length > 1, xaxis: { ...xaxis(unit), range: most ? [0, most * 1.03] : undefined },
      yaxis: { title: { text: "bits per byte" }, range: [Math.max(0, low - 0.12 * (high - low || low)), high + 0.1 * (high - low || high)] },
    });
  }

  function throughput(runs, axis) {
    const unit = along(runs, axis), traces = [];
    runs.forEach((run, index) => traces.push(...curve(run, "tokens_per_s", axis, unit, {
      colour: series(index), band: index === 0, hover: "%{y:.3s} tokens/s",
    })));
    const twin = runs[0].twin_tokens_per_s;
    const x = places(runs[0], axis, unit);
    if (twin) traces.push({
      x: [0, x[x.length - 1]], y: [twin, twin], type: "scatter", mode: "lines", name: "dense twin, timed before training",
      line: { color: palette.dim, width: 1.5, dash: "dot" }, hovertemplate: "%{y:.3s} tokens/s",
    });
    draw("plot-speed", traces, {
      showlegend: traces.length > 2 || runs.length > 1 || Boolean(twin), xaxis: xaxis(unit),
      yaxis: { title: { text: "tokens/s" }, rangemode: "tozero", tickformat: "~s" },
    });
  }

  function memory(runs, axis) {
    const unit = along(runs, axis), traces = [];
    const highest = Math.max(...runs.map((run) => run.peak_memory_bytes || 0));
    const [size, name] = highest >= 2 ** 30 ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];
    runs.forEach((run, index) => {
      for (const trace of curve(run, "memory", axis, unit, { colour: series(index), hover: `%{y:.2f} ${name}` })) {
        traces.push({ ...trace, y: trace.y.map((value) => (value === null ? null : value / size)) });
      }
    });
    draw("plot-memory", traces, {
      showlegend: runs.length > 1, xaxis: xaxis(unit), yaxis: { title: { text: name }, rangemode: "tozero" },
    });
  }

  function inside(runs, axis) {
    const unit = along(runs, axis), run = runs[0];
    const pair = (id, names, format, more) => {
      const traces = names.filter(([name]) => run.steps.curves[name].mean.some((value) => value !== null))
        .flatMap(([name, label], index) => curve(run, name, axis, unit, { colour: series(index), hover: format, extra: { name: label } }));
      draw(id, traces, { showlegend: traces.length > 1, xaxis: xaxis(unit), yaxis: { ...more } });
    };
    const rates = run.kind === "memory" ? [["dense_lr", "dense"], ["table_lr", "tables"]] : [["dense_lr", "dense"]];
    const norms = run.kind === "memory" ? [["dense_grad_norm", "dense"], ["table_grad_norm", "tables"]] : [["dense_grad_norm", "dense"]];
    pair("plot-rates", rates, "%{y:.2e}", { rangemode: "tozero", tickformat: ".0e" });
    pair("plot-norms", norms, "%{y:.3g}", { type: "log", tickformat: "~g" });
  }

  // Table use.

  const FIGURES = {
    evenness: {
      note: "Bits that codes carry, as a share of what even codes would: 100% is even, 0% is one row for every token. Below 20% hashing has collapsed.",
      of: (use) => (use.even_code_entropy ? use.code_entropy / use.even_code_entropy : 1), format: ".0%", range: [0, 1], isGood: true,
    },
    dead: {
      note: "Rows that none of the counted tokens addressed. Some are left out by chance where tokens are few: hover to see how many.",
      of: (use) => use.dead_share, format: ".1%", range: [0, 1],
    },
    constant: {
      note: "Bits of codes that are the same for nearly every token: what they could tell apart is lost.",
      of: (use) => use.constant_bits, format: ".1%", range: [0, 1],
    },
    movement: {
      note: "How far half of the rows have moved from their first values, as a multiple of those: 0 is not at all.",
      of: (use) => (use.movement ? use.movement[2] : null), format: ".3g",
    },
    hottest: {
      note: "The largest share of a table's lookups that one row takes.",
      of: (use) => use.hottest_share, format: ".1%", range: [0, 1],
    },
  };

  function place(names) {
    // "blocks.3.ffn1" is the line "ffn1" and the column "3"; names that are otherwise stand in one column.
    const split = names.map((name) => name.match(/^(?:[^.]*\.)*?(\d+)\.(.+)$/));
    if (split.some((found) => !found)) return { lines: names, columns: [""], of: (name) => [names.indexOf(name), 0] };
    const lines = [...new Set(split.map((found) => found[2]))];
    const columns = [...new Set(split.map((found) => found[1]))].sort((one, other) => one - other);
    const at = new Map(names.map((name, index) => [name, [lines.indexOf(split[index][2]), columns.indexOf(split[index][1])]]));
    return { lines, columns, of: (name) => at.get(name) };
  }

  function layers(tables, figure, chosen) {
    const last = tables.history[tables.history.length - 1].layers, what = FIGURES[figure];
    const grid = place(last.map((use) => use.name));
    const blank = () => grid.lines.map(() => grid.columns.map(() => null));
    const z = blank(), text = blank(), names = blank();
    for (const use of last) {
      const [line, column] = grid.of(use.name);
      z[line][column] = what.of(use);
      names[line][column] = use.name;
      text[line][column] = `<b>${use.name}</b><br>codes carry ${use.code_entropy.toFixed(2)} of ${use.even_code_entropy.toFixed(2)} bits`
        + `<br>rows not hit ${percent(use.dead_share)} (even codes: ${percent(use.even_dead_share)})`
        + `<br>constant bits ${percent(use.constant_bits)}<br>hottest row ${percent(use.hottest_share)}`
        + `<br>median score ${use.scores[2].toPrecision(2)}` + (use.movement ? `<br>median movement ${use.movement[2].toPrecision(3)}` : "");
    }
    const isOpen = grid.columns.length * 46 < width("plot-layers");
    const labels = grid.columns.map((name) => (name === "" ? "" : `${name}`));
    const [row, column] = chosen && grid.of(chosen) ? grid.of(chosen) : [-1, -1];
    draw("plot-layers", [{
      type: "heatmap", z, x: labels.map((_, index) => index), y: grid.lines.map((_, index) => index), hovertext: text, customdata: names,
      hovertemplate: "%{hovertext}<extra></extra>", texttemplate: isOpen ? `%{z:${what.format}}` : undefined,
      textfont: { size: 11.5 }, zmin: what.range ? what.range[0] : 0, zmax: what.range ? what.range[1] : largest(z),
      colorscale: what.isGood ? scale("high", "low") : scale("low", "high"), showscale: !isOpen, xgap: 2, ygap: 2,
      colorbar: { thickness: 10, tickformat: what.format, outlinewidth: 0 },
    }], {
      hovermode: "closest", dragmode: false,
      xaxis: { title: { text: grid.columns.length > 1 ? "block" : "" }, tickvals: labels.map((_, index) => index), ticktext: labels, showgrid: false, zeroline: false, showline: false, ticks: "" },
      yaxis: { tickvals: grid.lines.map((_, index) => index), ticktext: grid.lines, autorange: "reversed", showgrid: false, zeroline: false, showline: false, ticks: "" },
      shapes: row < 0 ? [] : [{ type: "rect", x0: column - 0.5, x1: column + 0.5, y0: row - 0.5, y1: row + 0.5, line: { color: palette.over, width: 3 } }],
    });
  }

  const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}%`;

  function history(tables, figure, chosen) {
    const what = FIGURES[figure], steps = tables.history.map((row) => row.step);
    const names = tables.history[tables.history.length - 1].layers.map((use) => use.name);
    const traces = names.map((name) => {
      const isChosen = name === chosen;
      return {
        x: steps, name, type: "scatter", mode: steps.length > 1 ? "lines+markers" : "markers",
        y: tables.history.map((row) => { const use = row.layers.find((each) => each.name === name); return use ? what.of(use) : null; }),
        line: { color: isChosen ? palette.over : faded(palette.accent, 0.45), width: isChosen ? 3 : 1.3 },
        marker: { size: isChosen ? 7 : 4 }, hovertemplate: `${name}: %{y:${what.format}}<extra></extra>`,
      };
    }).sort((one, other) => (one.name === chosen) - (other.name === chosen));
    draw("plot-history", traces, {
      hovermode: "closest", xaxis: { title: { text: "step" }, rangemode: "tozero" },
      yaxis: { tickformat: what.format, range: what.range, rangemode: what.range ? undefined : "tozero" },
    });
  }

  function unpacked(packed) {
    // Lines of bytes, as base64; 0 is the least, 255 the largest.
    const bytes = Uint8Array.from(atob(packed.bytes), (char) => char.charCodeAt(0));
    const lines = [];
    for (let start = 0; start < bytes.length; start += packed.columns) lines.push([...bytes.subarray(start, start + packed.columns)]);
    return lines.map((line) => line.map((value) => packed.low + (packed.high - packed.low) * value / 255));
  }

  function detail(layer, use) {
    const lines = layer.tables.map((_, index) => index);
    const every = Math.max(1, Math.ceil(lines.length / 16));
    const yaxis = {
      title: { text: "table" }, tickvals: lines.filter((index) => index % every === 0),
      ticktext: layer.tables.filter((_, index) => index % every === 0), autorange: "reversed", showgrid: false, zeroline: false,
    };
    const hits = unpacked(layer.hits), columns = hits[0].length;
    draw("plot-hits", [{
      type: "heatmap", z: hits, x: hits[0].map((_, index) => (100 * (index + 0.5)) / columns), y: lines,
      customdata: hits.map((line) => line.map((value) => (2 ** value < 0.1 && value <= layer.hits.low ? "not hit" : `${(2 ** value).toPrecision(2)} times even`))),
      text: hits.map((line, index) => line.map(() => layer.tables[index])),
      hovertemplate: "table %{text}, %{x:.0f}% of its rows<br>%{customdata}<extra></extra>",
      zmin: -5, zmax: 5, colorscale: [[0, palette.under], [0.5, palette.even], [1, palette.over]],
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: [-5, -3, 0, 3, 5], ticktext: ["none", "⅛", "1", "8", "32"] },
    }], { hovermode: "closest", xaxis: { title: { text: "rows, hottest first" }, ticksuffix: "%", showgrid: false, zeroline: false }, yaxis });

    const share = layer.lorenz.map((_, index) => index / (layer.lorenz.length - 1));
    draw("plot-lorenz", [
      { x: [0, 1], y: [0, 1], type: "scatter", mode: "lines", name: "equal shares", line: { color: palette.rule, width: 1.5 }, hoverinfo: "skip" },
      { x: share, y: layer.even_lorenz, type: "scatter", mode: "lines", name: "even codes", line: { color: palette.dim, width: 1.5, dash: "dot" }, hovertemplate: "%{y:.1%}" },
      { x: share, y: layer.lorenz, type: "scatter", mode: "lines", name: "this layer", line: { color: palette.accent, width: 2.5 }, fill: "tozeroy", fillcolor: faded(palette.accent, 0.1), hovertemplate: "%{y:.1%}" },
    ], {
      showlegend: true, xaxis: { title: { text: "rows, least hit first" }, tickformat: ".0%", hoverformat: ".0%", range: [0, 1] },
      yaxis: { title: { text: "share of lookups" }, tickformat: ".0%", range: [0, 1] },
    });

    const bits = unpacked(layer.bit_shares);
    const entropy = (p) => (p <= 0 || p >= 1 ? 0 : -(p * Math.log2(p) + (1 - p) * Math.log2(1 - p)));
    draw("plot-bits", [{
      type: "heatmap", z: bits.map((line) => line.map(entropy)), x: bits[0].map((_, index) => index + 1), y: lines,
      customdata: bits, text: bits.map((line, index) => line.map(() => layer.tables[index])),
      hovertemplate: "table %{text}, bit %{x}: %{z:.2f} bits<br>set for %{customdata:.0%} of the tokens<extra></extra>",
      zmin: 0, zmax: 1, colorscale: scale("high", "low"), xgap: 1, ygap: lines.length > 40 ? 0 : 1,
      colorbar: { thickness: 10, outlinewidth: 0, tickvals: [0, 0.5, 1] },
    }], { hovermode: "closest", xaxis: { title: { text: "bit of the code" }, dtick: 1, showgrid: false, zeroline: false }, yaxis });

    const octaves = layer.scores.shares.map((_, index) => layer.scores.first_octave + index / 4);
    draw("plot-scores", [{
      type: "bar", x: octaves.map((octave) => octave + 0.125), y: layer.scores.shares, width: 0.23, marker: { color: palette.accent },
      customdata: octaves.map((octave) => [(2 ** octave).toPrecision(2), (2 ** (octave + 0.25)).toPrecision(2)]),
      hovertemplate: "%{customdata[0]} to %{customdata[1]}: %{y:.1%}<extra></extra>",
    }], {
      hovermode: "closest", margin: { l: 52, r: 14, t: 8, b: 42 },
      xaxis: { title: { text: "score" }, showgrid: false, zeroline: false, ...powers(octaves[0], octaves[octaves.length - 1] + 0.25, width("plot-scores") < 420 ? 4 : 7) },
      yaxis: { tickformat: ".0%", nticks: 4, rangemode: "tozero" },
    });

    const moved = layer.movement;
    draw("plot-movement", moved ? [{
      type: "bar", x: moved.tables.map((table) => `${table}`), y: moved.moved, marker: { color: palette.accent },
      hovertemplate: "table %{x}: %{y:.3g}<extra></extra>",
    }] : [], {
      hovermode: "closest", margin: { l: 52, r: 14, t: 8, b: 42 },
      xaxis: { type: "category", showgrid: false, nticks: 12, title: { text: moved ? "table" : "" }, visible: Boolean(moved) },
      yaxis: { rangemode: "tozero", nticks: 4, visible: Boolean(moved) },
      annotations: moved ? [] : [{ text: "not known: the first rows cannot be drawn again here", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    });

    const body = document.querySelector("#hot-rows tbody");
    body.replaceChildren(...layer.hot_rows.map((row) => {
      const line = document.createElement("tr"), bitText = row.code.toString(2).padStart(layer.bits, "0");
      for (const [text, kind] of [[`${row.table}`, ""], [`${row.code}  (${bitText})`, ""], [percent(row.share), "number"]]) {
        const cell = document.createElement("td");
        cell.textContent = text;
        cell.className = kind;
        line.append(cell);
      }
      return line;
    }));
    return `${layer.num_tables} tables of ${(2 ** layer.bits).toLocaleString("en")} rows; codes carry ${use.code_entropy.toFixed(2)} of `
      + `${use.even_code_entropy.toFixed(2)} bits; ${percent(use.dead_share)} of the rows not hit`;
  }

  function powers(low, high, number) {
    const step = Math.max(1, Math.ceil((high - low) / number)), tickvals = [];
    for (let octave = Math.ceil(low); octave <= high; octave += step) tickvals.push(octave);
    return { tickvals, ticktext: tickvals.map((octave) => (octave < 0 ? `1/${2 ** -octave}` : `${2 ** octave}`)) };
  }

  // The plan.

  function bytes(value) {
    const names = ["B", "KiB", "MiB", "GiB", "TiB"];
    let index = 0;
    while (value >= 1023.5 && index < names.length - 1) { value /= 1024; index++; }
    return `${index && value < 99.95 ? value.toFixed(1) : value.toFixed(0)} ${names[index]}`;
  }

  function plan(found, figure) {
    const z = found[figure], holders = found.shown.map((rank) => `${found.holders} ${rank}`);
    const names = found.tables.map((table) => table.name);
    const text = z.map((line, index) => line.map((_, column) => `<b>${names[index]}</b> on ${holders[column]}<br>${found.tables[index].kind}: ${found.regions[index][column]}`
      + `<br>${bytes(found.bytes[index][column])} held` + (found.sent_forward.length ? `<br>sends ${bytes(found.sent_forward[index][column])} forward, ${bytes(found.sent_backward[index][column])} backward` : "")));
    const isOpen = holders.length * 72 < width("plot-plan") - 120 && names.length < 30;
    draw("plot-plan", [{
      type: "heatmap", z, x: holders.map((_, index) => index), y: names.map((_, index) => index), hovertext: text,
      hovertemplate: "%{hovertext}<extra></extra>", text: z.map((line) => line.map(bytes)), zmin: 0, zmax: largest(z),
      texttemplate: isOpen ? "%{text}" : undefined, textfont: { size: 11 }, colorscale: scale("low", "high"), showscale: false, xgap: 2, ygap: 2,
    }], {
      hovermode: "closest", dragmode: false,
      xaxis: { tickvals: holders.map((_, index) => index), ticktext: found.shown, title: { text: found.holders }, nticks: 16, side: "bottom", showgrid: false, zeroline: false, showline: false, ticks: "" },
      yaxis: { tickvals: names.map((_, index) => index), ticktext: names, autorange: "reversed", showgrid: false, zeroline: false, showline: false, ticks: "" },
    });
    const most = Math.max(...found.shown.map((_, index) => found.memory.reduce((sum, part) => sum + part.bytes[index], 0)));
    const [size, unit] = most >= 2 ** 30 ? [2 ** 30, "GiB"] : [2 ** 20, "MiB"];
    draw("plot-plan-memory", found.memory.map((part, index) => ({
      type: "bar", name: part.name, x: found.shown.map((rank) => `${rank}`), y: part.bytes.map((value) => value / size),
      marker: { color: index < SERIES ? series(index) : palette.rule }, hovertemplate: `%{y:.2f} ${unit}`,
    })), { barmode: "stack", showlegend: true, xaxis: { type: "category", title: { text: found.holders } }, yaxis: { title: { text: unit } } });
  }

  return { readPalette, loss, validation, throughput, memory, inside, layers, history, detail, plan, FIGURES };
})();
