"use strict";
(() => {
  const report = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const KINDS = {
    rms: { sign: "■", word: "RMSNorm", says: "became an RMSNorm" },
    changed: { sign: "◆", word: "changed", says: "changed, its mean stays" },
    kept: { sign: "▲", word: "left alone", says: "left alone" },
  };
  const TO_RMS = ["pre_rms_norm", "linear_norm", "crms_norm"];

  /** An element with properties, attributes and children; text is always text. */
  function el(tag, given = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(given)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("--")) made.style.setProperty(key, value);
      else if (key in made && !key.startsWith("aria")) made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children.filter((child) => child !== null && child !== ""));
    return made;
  }

  const kindOf = (site) =>
    site.kind === "LayerNorm" && site.rules.some((rule) => TO_RMS.includes(rule)) ? "rms" : site.rules.length ? "changed" : "kept";
  const bytes = (cost) => `${cost.before} to ${cost.after} bytes${cost.norms > 1 ? `, of ${cost.norms} norms together` : ""}`;

  // ------------------------------------------------------------ the streams

  const norms = []; // {site, graph, row, button, text, kind}, in the order of the page
  const others = []; // {row, text}: writers and sums

  /** Streams that overlap lie next to each other: stream → lane. */
  function lanesOf(steps) {
    const last = new Map(), lane = new Map(), busy = [];
    steps.forEach((step, i) => last.set(step.stream, i));
    steps.forEach((step, i) => {
      if (lane.has(step.stream)) return;
      let free = busy.findIndex((end) => end < i);
      if (free < 0) free = busy.length;
      lane.set(step.stream, free);
      busy[free] = last.get(step.stream);
    });
    return { lane, last, width: Math.min(busy.length, 6) };
  }

  /** A writer and the sum it is added by are one row. */
  function rowsOf(graph) {
    if (!graph.steps.length) return graph.sites.map((_, i) => ({ kind: "norm", stream: i, site: i, single: true }));
    const rows = [];
    graph.steps.forEach((step, at) => {
      const before = rows[rows.length - 1];
      if (step.kind === "sum" && before && before.kind === "writer" && before.stream === step.stream && !before.sum) Object.assign(before, { sum: step, at });
      else rows.push({ ...step, at });
    });
    return rows;
  }

  function drawLanes(row, i, lanes, state) {
    const cell = el("span", { class: "lanes", "aria-hidden": "true" });
    const lane = Math.min(lanes.lane.get(row.stream), 5);
    for (const [stream, centred] of state) {
      if (stream !== row.stream && lanes.last.get(stream) > i)
        cell.append(el("span", { class: `line${centred ? " centred" : ""}`, "--lane": Math.min(lanes.lane.get(stream), 5) }));
    }
    if (row.single) return cell;
    const after = row.kind === "norm" ? (row.inline ? row.centred : state.get(row.stream)) : (row.sum || row).centred;
    if (state.has(row.stream)) cell.append(el("span", { class: `line top${state.get(row.stream) ? " centred" : ""}`, "--lane": lane }));
    if (lanes.last.get(row.stream) > i) cell.append(el("span", { class: `line bottom${after ? " centred" : ""}`, "--lane": lane }));
    state.set(row.stream, after);
    if (row.kind === "norm" && !row.inline) cell.append(el("span", { class: "branch", "--lane": lane }));
    else cell.append(el("span", { class: "spot", "--lane": lane }, row.kind === "norm" ? "■" : row.kind === "sum" || row.sum ? "⊕" : "●"));
    return cell;
  }

  function normRow(row, graph, number) {
    const site = graph.sites[row.site], kind = kindOf(site), codes = [...new Set(site.refusals.map((r) => r.code))];
    const button = el("button", { class: "open", type: "button", "aria-expanded": "false", "aria-controls": "detail" },
      el("span", { class: "glyph", "aria-hidden": "true" }, KINDS[kind].sign),
      el("span", { class: "name" }, site.name),
      el("span", { class: "badge" }, kind === "rms" ? `${site.kind} → RMSNorm` : `${site.kind}: ${KINDS[kind].word}`),
      ...site.rules.map((rule) => el("span", { class: "done" }, `✓ ${rule}`)),
      ...codes.map((code) => el("span", { class: "not" }, `✕ ${code}`)),
      site.readers.length ? el("span", { class: "readers" }, `→ ${site.readers.slice(0, 3).join(", ")}${site.readers.length > 3 ? ` and ${site.readers.length - 3} more` : ""}`) : "");
    const text = [site.name, site.source, ...site.readers].join("\n").toLowerCase();
    norms.push({ site, graph: number, row: null, button, text, kind, codes });
    button.dataset.norm = norms.length - 1;
    return [button, kind];
  }

  function otherRow(row) {
    const what = row.kind === "sum" ? `sum in ${row.name}` : `${row.name} (${row.op})`;
    const value = row.sum || row;
    return el("span", { class: "text" }, `${what} `, el("span", { class: "t mono" }, value.type));
  }

  function drawGraph(graph, number) {
    const lanes = lanesOf(graph.steps), state = new Map();
    const list = el("ol", { class: "steps", "aria-label": `Graph ${number}`, "--lanes": `${Math.max(lanes.width, 1) * 16 + 20}px` });
    rowsOf(graph).forEach((row) => {
      let body, kind = "";
      if (row.kind === "norm") [body, kind] = normRow(row, graph, number);
      else body = otherRow(row);
      const item = el("li", { class: `step ${row.kind} ${kind}` }, drawLanes(row, row.at, lanes, state), el("div", { class: "body" }, body));
      if (row.kind === "norm") norms[norms.length - 1].row = item;
      else {
        item.dataset.tip = [row.kind === "sum" ? "sum" : `writes into the stream: ${row.op}`, (row.sum || row).centred ? "stored with mean zero" : "stored as it is", row.source].filter(Boolean).join("\n");
        others.push({ row: item });
      }
      list.append(item);
    });
    return list;
  }

  function drawAll() {
    const place = byId("graphs");
    report.graphs.forEach((graph, number) => {
      const streams = new Set(graph.steps.map((step) => step.stream)).size;
      const counted = [`${graph.sites.length} norms`, streams ? `${streams} stream${streams > 1 ? "s" : ""}` : ""].filter(Boolean).join(", ");
      place.append(el("p", { class: "graph-head" }, `Graph ${number}${graph.compile_id ? ` [${graph.compile_id}]` : ""} ${graph.function}: ${counted}`));
      place.append(drawGraph(graph, number));
    });
    if (!report.graphs.length) place.append(el("p", { class: "graph-head" }, report.note || "No graph was captured."));
  }

  // ------------------------------------------------------------ filters

  const shown = { rms: true, changed: true, kept: true };

  function fill(select, names) {
    for (const name of [...new Set(names)].sort()) select.append(el("option", { value: name }, name));
    select.hidden = select.options.length < 2;
  }

  function makeFilters() {
    fill(byId("rule"), norms.flatMap((norm) => norm.site.rules));
    fill(byId("code"), norms.flatMap((norm) => norm.codes));
    for (const [kind, said] of Object.entries(KINDS)) {
      const count = norms.filter((norm) => norm.kind === kind).length;
      const button = el("button", { type: "button", class: kind, "aria-pressed": "true", disabled: !count },
        el("span", { class: "glyph", "aria-hidden": "true" }, said.sign), `${count.toLocaleString("en")} ${said.says}`);
      button.addEventListener("click", () => {
        shown[kind] = !shown[kind];
        button.setAttribute("aria-pressed", shown[kind]);
        filter();
      });
      byId("decisions").append(button);
    }
    for (const id of ["words", "rule", "code"]) byId(id).addEventListener("input", filter);
  }

  function filter() {
    const words = byId("words").value.toLowerCase().split(/\s+/).filter(Boolean), rule = byId("rule").value, code = byId("code").value;
    const all = !words.length && !rule && !code && Object.values(shown).every(Boolean);
    let count = 0;
    for (const norm of norms) {
      const fits = shown[norm.kind] && (!rule || norm.site.rules.includes(rule)) && (!code || norm.codes.includes(code)) && words.every((word) => norm.text.includes(word));
      norm.row.hidden = !fits;
      count += fits;
    }
    for (const other of others) other.row.hidden = !all;
    byId("status").textContent = `${count.toLocaleString("en")} of ${norms.length.toLocaleString("en")} norms${all ? "" : "; writers are hidden while a filter is set"}`;
  }

  function clear() {
    for (const id of ["words", "rule", "code"]) byId(id).value = "";
    for (const kind of Object.keys(shown)) shown[kind] = true;
    byId("decisions").querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", "true"));
    filter();
  }

  // ------------------------------------------------------------ graph text

  const texts = new Map();

  /** Lines of a graph's text, where each value is defined, and who reads it. */
  function parsed(number, side) {
    const key = `${number} ${side}`;
    if (texts.has(key)) return texts.get(key);
    const lines = report.graphs[number][side].trimEnd().split("\n"), defined = new Map(), reads = [], users = lines.map(() => []), fixed = [];
    lines.forEach((line, i) => {
      const cut = line.startsWith("%") ? line.indexOf(" = ") : -1;
      reads.push([...new Set((line.slice(cut < 0 ? 0 : cut).match(/%\d+/g) || []).map((name) => defined.get(name)).filter((at) => at !== undefined))]);
      for (const at of reads[i]) users[at].push(i);
      for (const name of cut < 0 ? [] : line.slice(0, cut).match(/%\d+/g)) defined.set(name, i);
      fixed.push(cut >= 0 && /= (center|scale_features|fold_shift|compress\w*|\w+_input)\(/.test(line) && reads[i].every((at) => fixed[at]));
    });
    const tags = lines.map(() => "");
    for (const [kind, i, k, j, m] of report.differences[number]) {
      const [from, to] = side === "before" ? [i, k] : [j, m];
      if (kind !== "=") for (let at = from; at < to; at++) tags[at] = side === "before" ? "minus" : "plus";
    }
    texts.set(key, { lines, reads, users, fixed, tags });
    return texts.get(key);
  }

  const PASSES = /= (view|reshape|flatten|unflatten|transpose|permute|contiguous|dropout|to|_to_copy|getitem|chunk|split)\(/;

  /** Lines around these: what they read, folds of weights that these read, and what reads them, also through views. */
  function around(text, seeds) {
    const found = new Set(seeds);
    const add = (at, next) => {
      if (found.has(at)) return;
      found.add(at);
      for (const read of text.reads[at]) if (text.fixed[read]) add(read, null);
      if (next && PASSES.test(text.lines[at])) next(at);
    };
    const above = (at) => text.reads[at].forEach((read) => add(read, above));
    const below = (at) => text.users[at].slice(0, 6).forEach((user) => add(user, below));
    for (const seed of seeds) {
      above(seed);
      below(seed);
    }
    return [...found].sort((a, b) => a - b);
  }

  /** One line: number, sign, tokens; words that the other side lacks are marked. */
  function lineOf(text, at, own = false, foreign = null) {
    const line = text.lines[at], tag = text.tags[at], code = el("span", {});
    const pieces = line.match(/%\d+|#.*$|[\w.]+|[^%#\w]+|./g) || [];
    const named = line.startsWith("%") ? line.slice(line.indexOf(" = ") + 3).match(/^\w+/) : null;
    let operator = named ? named[0] : null;
    for (const piece of pieces) {
      let kind = "";
      if (piece.startsWith("%")) kind = "v";
      else if (piece.startsWith("#")) kind = "t";
      else if (piece === operator) [kind, operator] = ["op", null];
      const marked = tag && foreign && /^[a-z_][\w.]*$/i.test(piece) && !foreign.has(piece);
      if (marked) code.append(el("mark", { class: kind }, piece));
      else if (kind) code.append(el("span", { class: kind }, piece));
      else code.append(piece);
    }
    const sign = { minus: "−", plus: "+", "": " " }[tag];
    return el("div", { class: `ln ${tag}${own ? " self" : ""}` }, el("span", { class: "no" }, String(at + 1)), el("span", { class: "sign" }, sign), code);
  }

  const wordsOf = (text, from, to) => {
    const found = new Set();
    for (let at = from; at < to; at++) for (const word of text.lines[at].match(/[\w.]+/g) || []) found.add(word);
    return found;
  };

  function snippet(number, side, seeds, title, other) {
    const text = parsed(number, side), block = el("div", { class: "code", tabindex: "0", role: "group", "aria-label": title });
    const foreign = other.length ? new Set() : null;
    if (foreign) {
      const there = parsed(number, side === "before" ? "after" : "before");
      for (const at of around(there, other)) for (const word of there.lines[at].match(/[\w.]+/g) || []) foreign.add(word);
    }
    let last = -1;
    for (const at of around(text, seeds)) {
      if (last >= 0 && at > last + 1) block.append(el("div", { class: "gap", "aria-hidden": "true" }, "⋯"));
      block.append(lineOf(text, at, seeds.includes(at), foreign));
      last = at;
    }
    if (last < 0) block.append(el("div", { class: "gap" }, "no line of its own"));
    return el("figure", {}, el("figcaption", {}, title), block);
  }

  // ------------------------------------------------------------ one norm

  let chosen = null;

  function refusal(r) {
    const values = r.meaning && r.detail.startsWith(r.meaning) ? r.detail.slice(r.meaning.length).replace(/^: /, "") : "";
    return el("div", { class: "refusal" },
      el("p", {}, el("b", {}, `${r.rule} refused (${r.code}): `), r.meaning || r.detail),
      values ? el("p", {}, `found: ${values}`) : "",
      el("p", { class: "hint" }, `hint: ${r.hint}`),
      r.source ? el("p", { class: "at mono" }, `at ${r.source}`) : "");
  }

  function costTable(site) {
    if (!site.costs.length) return "";
    const body = el("tbody", {}, ...site.costs.map((c) => el("tr", {}, el("th", { scope: "row" }, c.rule), el("td", {}, c.before), el("td", {}, c.after), el("td", {}, String(c.norms)))));
    return el("table", {}, el("caption", {}, "Bytes per call, predicted"), el("thead", {}, el("tr", {}, ...["rule", "before", "after", "norms"].map((w) => el("th", { scope: "col" }, w)))), body);
  }

  function open(index) {
    const norm = norms[index], { site, graph } = norm, detail = byId("detail");
    if (chosen !== null) norms[chosen].button.setAttribute("aria-expanded", "false");
    chosen = index;
    norm.button.setAttribute("aria-expanded", "true");
    const close = el("button", { type: "button", class: "close", "aria-label": "Close" }, "✕");
    close.addEventListener("click", shut);
    const whole = el("button", { type: "button" }, "Show in the whole graph");
    whole.addEventListener("click", () => showWhole(graph, site.before[0] ?? 0));
    const facts = [site.source ? `at ${site.source}` : "", site.shares ? `computed by ${site.shares}` : "", `runs on: ${site.lowering}`, site.readers.length ? `read by ${site.readers.join(", ")}` : ""];
    detail.replaceChildren(
      el("h2", { class: norm.kind }, el("span", { class: "glyph", "aria-hidden": "true" }, KINDS[norm.kind].sign), site.name, el("span", { class: "badge" }, `${site.kind}: ${KINDS[norm.kind].says}`), close),
      ...facts.filter(Boolean).map((fact) => el("p", { class: "at mono" }, fact)),
      ...site.refusals.map(refusal), costTable(site), el("h3", {}, "Its part of the graph"),
      el("div", { class: "mini" }, snippet(graph, "before", site.before, "before", site.after), snippet(graph, "after", site.after, "after", site.before)),
      el("p", {}, whole));
    detail.classList.add("shown");
    detail.scrollTop = 0;
  }

  function shut() {
    byId("detail").classList.remove("shown");
    if (chosen === null) return;
    const { button } = norms[chosen];
    button.setAttribute("aria-expanded", "false");
    chosen = null;
    byId("detail").replaceChildren(el("p", { class: "empty" }, "Choose a norm: its reasons, bytes, and graph before and after are shown here."));
    button.focus();
  }

  // ------------------------------------------------------------ whole graphs

  const KEPT = 3, STEP = 60;

  function pair(number, from, to, there, end, same) {
    const before = parsed(number, "before"), after = parsed(number, "after");
    const [left, right] = same ? [null, null] : [wordsOf(before, from, to), wordsOf(after, there, end)];
    const sides = [el("div", {}), el("div", {})];
    for (let at = from; at < to; at++) sides[0].append(lineOf(before, at, false, right));
    for (let at = there; at < end; at++) sides[1].append(lineOf(after, at, false, left));
    const made = el("div", { class: "pair" }, ...sides);
    made.dataset.from = from;
    made.dataset.to = to;
    return made;
  }

  function* chunks(number, i, k, j, m, same) {
    for (let done = 0; done < Math.max(k - i, m - j); done += STEP)
      yield pair(number, Math.min(i + done, k), Math.min(i + done + STEP, k), Math.min(j + done, m), Math.min(j + done + STEP, m), same);
  }

  function drawWhole(details) {
    const number = Number(details.dataset.graph), place = details.querySelector(".diff");
    if (place.childElementCount) return;
    place.append(el("div", { class: "heads pair" }, el("div", {}, "before"), el("div", {}, "after")));
    for (const [kind, i, k, j, m] of report.differences[number]) {
      if (kind !== "=" || k - i <= 2 * KEPT + 2) place.append(...chunks(number, i, k, j, m, kind === "="));
      else {
        place.append(pair(number, i, i + KEPT, j, j + KEPT, true));
        const more = el("button", { type: "button", class: "more" }, `${(k - i - 2 * KEPT).toLocaleString("en")} equal lines`);
        more.dataset.from = i + KEPT;
        more.dataset.to = k - KEPT;
        more.addEventListener("click", () => more.replaceWith(...chunks(number, i + KEPT, k - KEPT, j + KEPT, m - KEPT, true)));
        place.append(more, pair(number, k - KEPT, k, m - KEPT, m, true));
      }
    }
  }

  function showWhole(number, line) {
    const details = byId(`whole-${number}`), there = (node) => Number(node.dataset.from) <= line && line < Number(node.dataset.to);
    details.open = true;
    drawWhole(details);
    const place = details.querySelector(".diff");
    [...place.querySelectorAll(".more")].filter(there).forEach((more) => more.click());
    const found = [...place.querySelectorAll(".pair")].find(there);
    details.scrollIntoView();
    if (!found) return;
    const row = found.firstElementChild.children[line - Number(found.dataset.from)] || found;
    row.scrollIntoView({ block: "center" });
    place.focus({ preventScroll: true });
  }

  // ------------------------------------------------------------ keys, hints, colours

  const visible = () => norms.filter((norm) => !norm.row.hidden);

  function move(step, from = document.activeElement) {
    const list = visible();
    if (!list.length) return;
    const at = list.findIndex((norm) => norm.button === from);
    const next = step === -Infinity ? 0 : step === Infinity ? list.length - 1 : at < 0 ? (step > 0 ? 0 : list.length - 1) : Math.min(Math.max(at + step, 0), list.length - 1);
    list[next].button.focus();
    list[next].row.scrollIntoView({ block: "nearest" });
    if (chosen !== null && !byId("keys").open) open(Number(list[next].button.dataset.norm));
  }

  const KEYS = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, Home: -Infinity, End: Infinity };

  function key(event) {
    const within = event.target, typing = within.matches("input, select, textarea"), scrolls = within.closest(".diff, .code, pre");
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    if (event.key === "Escape") {
      if (chosen !== null) shut();
      else clear();
    } else if (typing && event.key === "ArrowDown" && within.id === "words") move(1, null);
    else if (typing || scrolls) return;
    else if (event.key === "/") byId("words").focus();
    else if (event.key === "?") byId("keys").showModal();
    else if (event.key in KEYS) move(KEYS[event.key]);
    else return;
    event.preventDefault();
  }

  /** What is said on hover and focus: reasons, source line, bytes. */
  function hint(target) {
    if (target.dataset.norm === undefined) return target.dataset.tip || "";
    const { site, kind } = norms[target.dataset.norm];
    const reasons = site.refusals.map((r) => `✕ ${r.rule} (${r.code}): ${r.meaning || r.detail}`);
    return [`${site.kind}: ${KINDS[kind].says}`, ...site.costs.map((cost) => `✓ ${cost.rule}: ${bytes(cost)}`), ...reasons, site.source ? `at ${site.source}` : ""].filter(Boolean).join("\n");
  }

  function tip(event) {
    const target = event.target.closest ? event.target.closest("[data-norm], [data-tip]") : null, box = byId("tip");
    document.querySelectorAll("[aria-describedby=tip]").forEach((node) => node.removeAttribute("aria-describedby"));
    box.hidden = !target;
    if (!target) return;
    box.textContent = hint(target);
    target.setAttribute("aria-describedby", "tip");
    const at = target.getBoundingClientRect(), own = box.getBoundingClientRect();
    const below = at.bottom + 6 + own.height < window.innerHeight;
    box.style.top = `${below ? at.bottom + 6 : Math.max(at.top - own.height - 6, 4)}px`;
    box.style.left = `${Math.max(Math.min(at.left + 24, window.innerWidth - own.width - 8), 8)}px`;
  }

  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let theme = "system";

  function colours() {
    document.documentElement.dataset.theme = theme === "system" ? (dark.matches ? "dark" : "light") : theme;
    byId("theme").textContent = { system: "◐", light: "☀", dark: "☾" }[theme];
    byId("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
  }

  colours();
  dark.addEventListener("change", colours);
  byId("theme").addEventListener("click", () => {
    theme = { system: dark.matches ? "light" : "dark", light: dark.matches ? "dark" : "system", dark: dark.matches ? "system" : "light" }[theme];
    colours();
  });
  byId("help").addEventListener("click", () => byId("keys").showModal());
  drawAll();
  makeFilters();
  filter();
  byId("graphs").addEventListener("click", (event) => {
    const button = event.target.closest(".open");
    if (button) open(Number(button.dataset.norm));
  });
  document.querySelectorAll("details.whole").forEach((details) => details.addEventListener("toggle", () => details.open && drawWhole(details)));
  document.addEventListener("keydown", key);
  for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, tip);
  for (const kind of ["focusout", "scroll"]) document.addEventListener(kind, () => (byId("tip").hidden = true), true);
  document.documentElement.dataset.ready = "true";
})();
