// Buttons, lists, printing, and the live page: keeps what is chosen and has the charts drawn.
(() => {
  const charts = window.reportCharts, theme = window.reportTheme, byId = (id) => document.getElementById(id);
  const chosen = { axis: "step", figure: "evenness", plan: "bytes", layer: null };
  let story = JSON.parse(byId("document").textContent);

  const has = (id) => byId(id) !== null;

  function drawCurves() {
    if (!has("plot-loss")) return;
    charts.loss(story.runs, chosen.axis);
    if (has("plot-bpb")) charts.validation(story.runs, chosen.axis);
    charts.throughput(story.runs, chosen.axis);
    charts.memory(story.runs, chosen.axis);
    if (byId("details-inside").open) charts.inside(story.runs, chosen.axis);
  }

  function drawTables() {
    const tables = story.runs[0].tables;
    if (!tables || !has("plot-layers")) return;
    byId("figure-note").textContent = charts.FIGURES[chosen.figure].note;
    const list = byId("layer");
    if (list && !chosen.layer) chosen.layer = list.value;
    charts.layers(tables, chosen.figure, chosen.layer);
    charts.history(tables, chosen.figure, chosen.layer);
    if (list) drawLayer();
  }

  function drawLayer() {
    const tables = story.runs[0].tables, last = tables.history[tables.history.length - 1];
    const layer = tables.detail.layers.find((each) => each.name === chosen.layer) || tables.detail.layers[0];
    const use = last.layers.find((each) => each.name === layer.name) || last.layers[0];
    byId("layer-line").textContent = charts.detail(layer, use);
  }

  function drawPlan() {
    if (has("plot-plan")) charts.plan(story.runs[0].plan, chosen.plan);
  }

  function drawAll() {
    charts.readPalette();
    drawCurves();
    drawTables();
    drawPlan();
  }

  const redraw = { axis: drawCurves, figure: drawTables, plan: drawPlan };

  function showTheme() {
    byId("theme-name").textContent = theme.choice;
    byId("theme").setAttribute("aria-label", `Colours: ${theme.choice === "auto" ? "as the system has them" : theme.choice}`);
  }

  function connect() {
    for (const group of document.querySelectorAll("[data-choice]")) {
      const name = group.dataset.choice, buttons = group.querySelectorAll("button");
      const press = () => buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.value === chosen[name])));
      press();
      buttons.forEach((button) => button.addEventListener("click", () => {
        chosen[name] = button.dataset.value;
        press();
        redraw[name]();
      }));
    }
    const list = byId("layer");
    if (list) {
      if (chosen.layer) list.value = chosen.layer;
      list.addEventListener("change", () => { chosen.layer = list.value; drawTables(); });
    }
    if (has("details-inside")) byId("details-inside").addEventListener("toggle", drawCurves);
    byId("theme").addEventListener("click", () => theme.next());
    showTheme();
    drawAll();
    if (has("plot-layers")) {
      byId("plot-layers").on("plotly_click", (event) => {
        const name = event.points[0].customdata;
        if (!name || !byId("layer")) return;
        chosen.layer = byId("layer").value = name;
        drawTables();
      });
    }
  }

  document.addEventListener("theme", () => { showTheme(); drawAll(); });

  addEventListener("beforeprint", () => theme.print(true));
  addEventListener("afterprint", () => theme.print(false));

  // Live: ask for what is new, and put it where it belongs.
  const every = Number(document.body.dataset.liveEvery || 0);
  let version = story.version_of_run;

  function take(update) {
    const fresh = new DOMParser().parseFromString(update.html, "text/html");
    story = update.document;
    version = story.version_of_run;
    document.title = `${story.runs[0].label} · mfdist report`;
    if (fresh.querySelector("main").dataset.sections !== byId("main").dataset.sections
        || Boolean(fresh.getElementById("layer")) !== Boolean(byId("layer"))
        || Boolean(fresh.getElementById("plot-bpb")) !== Boolean(byId("plot-bpb"))) {
      const open = [...document.querySelectorAll("details[open]")].map((each) => each.id);
      for (const part of ["header", "nav", "main"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
      open.forEach((id) => { if (byId(id)) byId(id).open = true; });
      connect();
      return;
    }
    for (const part of fresh.querySelectorAll("[data-live]")) {
      const here = byId(part.id);
      if (here && here.innerHTML !== part.innerHTML) here.innerHTML = part.innerHTML;
    }
    drawAll();
  }

  async function look() {
    try {
      const answer = await fetch(`/update?have=${encodeURIComponent(version)}`, { cache: "no-store" });
      if (answer.status === 200) take(await answer.json());
      mark("live", false);
    } catch {
      mark("no connection", true);
    }
    setTimeout(look, every);
  }

  function mark(text, isLost) {
    const place = byId("live-mark");
    if (place.textContent !== text) place.textContent = text;
    place.classList.toggle("lost", isLost);
  }

  connect();
  if (every) setTimeout(look, every);
})();
