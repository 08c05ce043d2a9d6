// Brings the interactive figures of policyopt_book.figures to life. Every output carries this script, and any copy of it
// serves all figures of the page. A figure is drawn when it comes near the window. Until then, and wherever that
// fails (no scripts, no network, no Plotly), the reader sees the picture that stands in the page.
(() => {
  const css = `
    .policyopt-figure .po-controls { display: flex; flex-wrap: wrap; gap: 0.25rem 2rem; margin: 0.5rem 0; }
    .policyopt-figure .po-controls label {
      display: flex; flex: 1 1 14rem; align-items: center; gap: 0.5rem; min-height: 2.25rem; margin: 0; }
    .policyopt-figure .po-controls input { flex: 1 1 6rem; min-width: 5rem; height: 1.75rem; accent-color: #0072b2; }
    .policyopt-figure .po-controls output { min-width: 3em; text-align: right; font-variant-numeric: tabular-nums; }
    .policyopt-figure .po-controls select {
      flex: 1 1 6rem; min-width: 0; min-height: 1.9rem; font: inherit; color: inherit; background: transparent;
      border: 1px solid; border-radius: 0.2rem; }
    .policyopt-figure .po-controls option { color: #000; background: #fff; }
    .policyopt-figure .po-legend {
      display: flex; flex-wrap: wrap; gap: 0.1rem 1.25rem; margin: 0; padding: 0; list-style: none; font-size: 0.9em; }
    .policyopt-figure .po-legend li { display: flex; align-items: center; gap: 0.4rem; margin: 0; }
    .policyopt-figure .po-readout { min-height: 3em; margin: 0.25rem 0; }
    .policyopt-figure [hidden] { display: none !important; }
    .policyopt-figure .po-plot { overflow: hidden; }
    .cell_output .text_html:has(> .policyopt-figure) {
      padding: 0 !important; color: inherit !important; background: none !important; }`;

  const make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  // One script element for all figures of a page. The book names its own copy; elsewhere the address below serves
  // the same bytes, or the browser refuses them.
  const library = () => {
    if (window.Plotly) return Promise.resolve();
    return (window.policyoptPlotly ??= new Promise((resolve, reject) => {
      const local = window.POLICYOPT_PLOTLY_URL;
      const script = make("script", local ? { src: local } : {
        src: "__URL__", integrity: "__INTEGRITY__", crossorigin: "anonymous",
      });
      script.onload = resolve;
      script.onerror = reject;
      document.head.append(script);
    }));
  };

  const DASH = { dash: "6 4", dot: "2 3", dashdot: "6 3 2 3" };

  const legend = (traces, paint) => {
    const list = make("ul", { class: "po-legend" });
    for (const trace of traces.filter((t) => t.name && t.showlegend !== false)) {
      const bar = trace.type === "bar";
      const colour = paint(bar ? trace.marker.color : trace.line?.color ?? trace.marker.color);
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      for (const [k, v] of Object.entries({ width: 26, height: 12, "aria-hidden": "true" })) svg.setAttribute(k, v);
      const shape = (tag, attributes) => {
        const element = document.createElementNS(svg.namespaceURI, tag);
        for (const [k, v] of Object.entries(attributes)) element.setAttribute(k, v);
        svg.append(element);
      };
      if (bar) shape("rect", { x: 6, y: 0, width: 14, height: 12, fill: colour, opacity: trace.opacity ?? 1 });
      if (trace.mode?.includes("lines")) {
        shape("line", { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour, "stroke-width": 2.5,
                        "stroke-dasharray": DASH[trace.line?.dash] ?? "none" });
      }
      if (trace.mode?.includes("markers")) shape("circle", { cx: 13, cy: 6, r: 4.5, fill: colour });
      list.append(make("li", {}, svg, trace.name));
    }
    return list;
  };

  const control = (spec, state, changed) => {
    const words = make("output", {});
    const field = spec.kind === "select"
      ? make("select", {}, ...spec.options.map((text, i) => make("option", { value: i }, text)))
      : make("input", { type: "range", min: 0, max: spec.options.length - 1, step: 1, value: spec.start });
    field.value = spec.start;
    const say = () => {
      state[spec.name] = Number(field.value);
      words.value = spec.options[field.value];
      if (spec.kind !== "select") field.setAttribute("aria-valuetext", words.value);
    };
    field.addEventListener("input", () => { say(); changed(); });
    say();
    words.setAttribute("aria-hidden", "true");
    return make("label", {}, make("span", {}, spec.label), field, ...(spec.kind === "select" ? [] : [words]));
  };

  // Panels stand side by side, or one above the other where there is no room for that.
  const arrange = (spec, layout, width) => {
    const n = spec.panels.length;
    const margin = { l: 58, r: 10, t: 30, b: 48 };
    const inner = width - margin.l - margin.r;
    const wide = width >= 330 * n || (n > 1 && width >= 600);
    const gap = wide ? 74 : 86;
    const sizes = spec.panels.map((panel) => (wide ? panel.width ?? 1 : Math.min(panel.height ?? 230, inner)));
    const plot = wide ? spec.height : sizes.reduce((a, b) => a + b) + gap * (n - 1);
    const room = wide ? inner - gap * (n - 1) : plot - gap * (n - 1);
    const unit = room / sizes.reduce((a, b) => a + b);
    let at = 0;
    layout.annotations = [];
    spec.panels.forEach((panel, i) => {
      const id = i === 0 ? "" : i + 1;
      const x = (layout[`xaxis${id}`] ??= {});
      const y = (layout[`yaxis${id}`] ??= {});
      const [from, to] = [at, at + sizes[i] * unit];
      at = to + gap;
      x.domain = wide ? [from / inner, to / inner] : [0, 1];
      y.domain = wide ? [0, 1] : [1 - to / plot, 1 - from / plot].map((v) => Math.min(1, Math.max(0, v)));
      x.anchor = `y${id}`;
      y.anchor = `x${id}`;
      layout.annotations.push({
        text: panel.title, showarrow: false, xref: "paper", yref: "paper", xanchor: "center", yanchor: "bottom",
        x: (x.domain[0] + x.domain[1]) / 2, y: y.domain[1], yshift: 4, font: { size: 14 },
      });
    });
    Object.assign(layout, { margin, width, height: plot + margin.t + margin.b });
  };

  const start = (root) => {
    const spec = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const picture = root.querySelector("img");
    const state = {};
    const place = (by) => by.reduce((at, name) => {
      const { options } = spec.controls.find((c) => c.name === name);
      return at * options.length + state[name];
    }, 0);

    const plot = make("div", { class: "po-plot", role: "img", "aria-label": picture.alt });
    const readout = make("p", { class: "po-readout", role: "status" });
    const names = make("div", {});
    const live = make("div", { hidden: "" });

    const draw = () => {
      const style = getComputedStyle(root);
      const [r, g, b] = style.color.match(/[\d.]+/g);
      const inks = { "@text": style.color, "@grid": `rgba(${r},${g},${b},0.22)`, "@shade": `rgba(${r},${g},${b},0.12)` };
      const paint = (x) => {
        if (typeof x === "string") return inks[x] ?? x;
        if (Array.isArray(x)) return x.map(paint);
        return x && typeof x === "object" ? Object.fromEntries(Object.entries(x).map(([k, v]) => [k, paint(v)])) : x;
      };
      const data = structuredClone(spec.data);
      for (const { trace, by, values } of spec.changes) {
        for (const [key, value] of Object.entries(values[place(by)])) {
          data[trace][key] = value?.constructor === Object ? { ...data[trace][key], ...value } : value;
        }
      }
      const layout = paint(structuredClone(spec.layout));
      arrange(spec, layout, Math.floor(live.getBoundingClientRect().width));
      for (const key of Object.keys(layout).filter((k) => /^[xy]axis/.test(k))) {
        layout[key] = {
          gridcolor: inks["@grid"], linecolor: inks["@text"], zeroline: false, fixedrange: true, automargin: false,
          ...layout[key],
          ...(layout[key].title && { title: { standoff: 8, font: { size: 13 }, ...layout[key].title } }),
        };
      }
      Object.assign(layout, {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, dragmode: false,
        hovermode: "closest", barmode: "overlay",
        font: { family: style.fontFamily, size: 13, color: style.color },
        hoverlabel: { font: { family: style.fontFamily } },
      });
      const said = spec.readout.map(({ by, values }) => values[place(by)]).join(" ");
      if (readout.textContent !== said) readout.textContent = said;
      names.replaceChildren(legend(data, (x) => inks[x] ?? x));
      return window.Plotly.react(plot, paint(data), layout, { displayModeBar: false, scrollZoom: false });
    };

    let waiting = 0;
    const redraw = () => {
      if (!waiting) waiting = requestAnimationFrame(() => { waiting = 0; if (live.clientWidth) draw(); });
    };

    const wake = () => library().then(async () => {
      const controls = make("div", { class: "po-controls" }, ...spec.controls.map((c) => control(c, state, redraw)));
      live.append(controls, plot, names, readout);
      root.append(live);
      live.hidden = false;
      try {
        await draw();
      } catch (error) {
        live.remove();
        throw error;
      }
      picture.hidden = true;
      root.dataset.ready = "";
      let width = live.clientWidth;
      new ResizeObserver(() => { if (live.clientWidth !== width) { width = live.clientWidth; redraw(); } }).observe(live);
      // The page's theme: an attribute in the book and in Jupyter, the system's wish elsewhere.
      const themes = new MutationObserver(() => setTimeout(redraw, 50));
      for (const element of [document.documentElement, document.body]) {
        themes.observe(element, { attributeFilter: ["data-theme", "data-mode", "data-jp-theme-light", "theme", "class"] });
      }
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(redraw, 50));
    }).catch((error) => console.warn("The figure stays a picture:", error?.message ?? "Plotly could not be loaded"));

    if (!("IntersectionObserver" in window)) return wake();
    const near = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) { near.disconnect(); wake(); }
    }, { rootMargin: "500px" });
    near.observe(root);
  };

  const startAll = () => {
    if (!document.getElementById("policyopt-figure-style")) {
      document.head.append(make("style", { id: "policyopt-figure-style" }, css));
    }
    for (const root of document.querySelectorAll(".policyopt-figure:not([data-started])")) {
      root.dataset.started = "";
      start(root);
    }
  };
  // JupyterLab may run this before it puts the output into the page.
  const soon = () => [0, 100, 500, 2000].forEach((ms) => setTimeout(startAll, ms));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", soon);
  else soon();
})();
