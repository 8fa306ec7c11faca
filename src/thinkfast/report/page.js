"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const percent = (share) => (share === null ? "–" : `${Math.round(share * 100)}\u00a0%`);
  const seconds = (value) => `${Number(value.toPrecision(value < 0.1 ? 2 : 3))}\u00a0s`;

  /** An element; strings among the children become text, never markup. */
  function el(name, attributes = {}, ...children) {
    const svg = ["svg", "line", "circle", "rect", "text", "title"].includes(name);
    const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const key = (model) =>
    el("span", { class: `key s${model.slot}` }, el("span", { class: "glyph", "aria-hidden": "true" }, model.glyph), model.name);

  /* reading values off a figure; those against time follow the budget of the browser below */

  const followers = [];

  function readable(canvas) {
    const plot = data.plots[canvas.dataset.plot];
    const readout = canvas.parentElement.querySelector(".readout");
    const crosshair = canvas.querySelector(".crosshair");
    const span = Math.log(plot.x.at(-1) / plot.x[0]);
    const place = plot.x.map((x) => (span ? Math.log(x / plot.x[0]) / span : 0.5));
    const name = (x) => (plot.unit === "s" ? `${seconds(x)} per problem` : `k = ${x}`);
    let chosen = -1;

    function line(series, index) {
      const model = data.browser.models.find((one) => one.name === series.model);
      const drawn = series.samples && series.samples[index] !== null ? `, ${series.samples[index].toFixed(1)} samples` : "";
      return [model, `${percent(series.mean[index])} [${percent(series.low[index])}, ${percent(series.high[index])}]${drawn}`];
    }

    function show(index) {
      chosen = Math.max(0, Math.min(plot.x.length - 1, index));
      const narrow = getComputedStyle(canvas.querySelector("svg.wide")).display === "none";
      const [left, right, top, bottom] = narrow ? plot.narrow : plot.wide;
      crosshair.hidden = false;
      crosshair.style.left = `${100 * (left + place[chosen] * (right - left))}%`;
      crosshair.style.top = `${100 * top}%`;
      crosshair.style.height = `${100 * (bottom - top)}%`;
      const lines = plot.series.map((series) => line(series, chosen));
      readout.replaceChildren(
        el("b", {}, name(plot.x[chosen])),
        ...lines.map(([model, text]) => el("span", { class: "line" }, key(model), ` ${text}`)),
      );
      canvas.setAttribute("aria-valuenow", chosen);
      canvas.setAttribute("aria-valuetext", [name(plot.x[chosen]), ...lines.map(([m, text]) => `${m.name} ${text}`)].join("; "));
    }

    function point(event) {
      const box = canvas.getBoundingClientRect();
      const narrow = getComputedStyle(canvas.querySelector("svg.wide")).display === "none";
      const [left, right] = narrow ? plot.narrow : plot.wide;
      const at = ((event.clientX - box.left) / box.width - left) / (right - left);
      const gaps = place.map((p) => Math.abs(p - at));
      show(gaps.indexOf(Math.min(...gaps)));
    }

    if (plot.unit === "s") followers.push((tau) => {
      const gaps = plot.x.map((x) => Math.abs(Math.log(x / tau)));
      show(gaps.indexOf(Math.min(...gaps)));
    });
    canvas.addEventListener("pointermove", point);
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("keydown", (event) => {
      const last = plot.x.length - 1;
      const to = { ArrowRight: chosen + 1, ArrowUp: chosen + 1, ArrowLeft: chosen - 1, ArrowDown: chosen - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(to);
    });
  }
  document.querySelectorAll("[data-plot]").forEach(readable);

  /* the browser of problems */

  const { models, problems, low, high, start: opening } = data.browser;
  const STEPS = Number($("budget").max);
  const TAU = 0, CLASS = 1, RIGHT = 2, TOKENS = 3, CUT = 4, ANSWER = 5, INDEX = 6, REWARD = 7;
  const SHOWN_CLASSES = 4;
  const scored = problems.some((problem) => problem.rows.some((rows) => rows.some((row) => row.length > REWARD)));
  const state = { problem: 0, model: 0, open: new Set(), running: false };

  const budget = () => low * (high / low) ** (Number($("budget").value) / STEPS);
  const finished = (rows, tau) => rows.filter((row) => row[TAU] <= tau).length;

  /** Classes of the answers that ended by tau, most votes first; share is the vote's part that is right, null before any vote.
      A vote counts 1, exp(reward) relative to the best by then, or only as its reward, the highest of its class. */
  function vote(rows, tau) {
    const classes = new Map();
    const how = scored ? $("how").value : "majority";
    const best = Math.max(...rows.filter((row) => row[TAU] <= tau && row[CLASS] >= 0).map((row) => row[REWARD] ?? 0));
    for (const row of rows) {
      if (row[TAU] > tau) break;
      if (row[CLASS] < 0) continue;
      const one = classes.get(row[CLASS]) ?? { answer: row[ANSWER], right: row[RIGHT] === 1, votes: 0 };
      const weight = how === "majority" ? 1 : Math.exp((row[REWARD] ?? 0) - best);
      one.votes = how === "best_of_n" ? Math.max(one.votes, weight) : one.votes + weight;
      classes.set(row[CLASS], one);
    }
    const ranked = [...classes.values()].sort((a, b) => b.votes - a.votes);
    const top = ranked.filter((one) => one.votes === ranked[0].votes);
    return { ranked, top, share: top.length ? top.filter((one) => one.right).length / top.length : null };
  }

  function verdict(share) {
    if (share === null) return ["·", "no vote yet"];
    if (share === 1) return ["✓", "right"];
    return share === 0 ? ["✗", "wrong"] : ["≈", "tied, right among the leaders"];
  }

  const OUTCOMES = [
    ["all", "all models", (shares) => shares.every((s) => s === 1)],
    ["none", "none of them", (shares) => shares.every((s) => s !== 1)],
    ["split", "some, not all", (shares) => shares.some((s) => s === 1) && shares.some((s) => s !== 1)],
    ...models.flatMap((model, m) => [
      [`yes-${m}`, `${model.name} is right`, (shares) => shares[m] === 1],
      [`only-${m}`, `only ${model.name} is right`, (shares) => shares.every((s, i) => (s === 1) === (i === m))],
    ]),
  ];

  function matching(tau) {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const level = $("level").value;
    const outcome = OUTCOMES.find(([id]) => id === $("outcome").value);
    return problems
      .map((problem, index) => ({ problem, index, shares: problem.rows.map((rows) => vote(rows, tau).share) }))
      .filter(({ problem, shares }) => {
        const text = `${problem.id} ${problem.problem} ${problem.answer}`.toLowerCase();
        return (!level || String(problem.level) === level) && (!outcome || outcome[2](shares)) && words.every((word) => text.includes(word));
      });
  }

  function mark(model, share) {
    const [sign, said] = verdict(share);
    return el("span", { class: `mark s${model.slot}`, title: `${model.name}: ${said}` },
      el("span", { class: "glyph", "aria-hidden": "true" }, model.glyph),
      el("span", { "aria-hidden": "true" }, sign), el("span", { class: "hidden" }, `${model.name} ${said}. `));
  }

  function renderList(tau) {
    const found = matching(tau);
    const focused = document.activeElement?.closest?.("#list button")?.dataset.index;
    $("found").textContent = `${found.length} of ${problems.length} problems`;
    $("list").replaceChildren(...found.map(({ problem, index, shares }) => {
      const button = el("button", { type: "button", "data-index": index, "aria-current": String(index === state.problem) },
        el("span", { class: "text" }, problem.problem),
        el("span", { class: "marks" }, ...models.map((model, m) => mark(model, shares[m]))));
      return el("li", {}, button);
    }));
    if (focused !== undefined) $("list").querySelector(`[data-index="${focused}"]`)?.focus({ preventScroll: true });
  }

  function renderTally(tau) {
    $("tally").replaceChildren(...models.map((model, m) => {
      const shares = problems.map((problem) => vote(problem.rows[m], tau).share ?? 0);
      const right = shares.reduce((a, b) => a + b, 0) / problems.length;
      const drawn = problems.reduce((sum, problem) => sum + finished(problem.rows[m], tau), 0) / problems.length;
      return el("span", {}, key(model), ` ${drawn.toFixed(1)} samples, ${percent(right)} right`);
    }));
  }

  const tally = (votes) => (Number.isInteger(votes) ? String(votes) : votes < 0.005 ? "<0.01" : votes.toFixed(2));

  function bar(answer, votes, most, right) {
    return el("div", { class: "bar-row" },
      el("span", { class: right ? "name right" : "name", title: answer }, answer),
      el("span", { class: "track" }, el("span", { class: right ? "fill right" : "fill", style: `width:${(100 * votes) / most}%` })),
      el("span", {}, right ? `${tally(votes)} ✓` : tally(votes)));
  }

  /** When each sample ended: right ones filled and above, wrong ones hollow and below, without an answer a speck. */
  function strip(rows, tau, slot) {
    const x = (t) => `${((100 * Math.log(Math.min(high, Math.max(low, t)) / low)) / Math.log(high / low)).toFixed(2)}%`;
    const svg = el("svg", { class: `strip s${slot}`, "aria-hidden": "true" }, el("line", { class: "axis", x1: 0, x2: "100%", y1: 29, y2: 29 }));
    for (const row of rows) {
      if (row[TAU] > high) break;
      const kind = (row[RIGHT] ? "right" : "wrong") + (row[TAU] > tau ? " later" : "");
      svg.append(el("circle", { class: kind, cx: x(row[TAU]), cy: row[RIGHT] ? 9 : 20, r: row[CLASS] < 0 ? 1.5 : 3.2 }));
    }
    svg.append(el("line", { class: "now", x1: x(tau), x2: x(tau), y1: 1, y2: 33 }));
    svg.append(el("text", { x: 0, y: 43 }, seconds(low)), el("text", { x: "100%", y: 43, "text-anchor": "end" }, seconds(high)));
    return svg;
  }

  function renderVotes(tau) {
    const problem = problems[state.problem];
    $("votes").replaceChildren(...models.map((model, m) => {
      const rows = problem.rows[m];
      const { ranked, top, share } = vote(rows, tau);
      const rest = ranked.slice(SHOWN_CLASSES);
      const most = ranked.length ? ranked[0].votes : 1;
      const box = el("div", { class: "votes-box" }, ...ranked.slice(0, SHOWN_CLASSES).map((one) => bar(one.answer, one.votes, most, one.right)));
      if (rest.length) {
        const votes = rest.reduce((sum, one) => sum + one.votes, 0);
        box.append(el("div", { class: "bar-row soft" }, el("span", { class: "name" }, "other"), el("span", {}, `${rest.length} more answers`), el("span", {}, tally(votes))));
      }
      const said = verdict(share);
      const text = share === null ? "No vote yet" : `${said[0]} Votes ${top.map((one) => one.answer).join(" or ")}: ${said[1]}`;
      return el("section", { class: `vote s${model.slot}`, style: "margin:0", "aria-label": `Vote of ${model.name}` },
        el("h4", {}, key(model), el("span", { class: "soft" }, `${finished(rows, tau)} of ${rows.length} samples`)),
        box, strip(rows, tau, model.slot), el("p", { class: "verdict" }, text));
    }));
  }

  function chain(row, text) {
    const said = row[CLASS] < 0 ? "– no answer" : row[RIGHT] ? "✓ right" : "✗ wrong";
    const details = el("details", { "data-sample": row[INDEX] },
      el("summary", {}, el("span", { class: row[RIGHT] ? "state" : "state wrong" }, said),
        el("span", {}, row[ANSWER] === null ? "" : String(row[ANSWER])),
        el("span", { class: "soft" }, `${row[TOKENS]} tokens${row[CUT] ? ", cut at the limit" : ""}`),
        el("span", { class: "soft" }, row[REWARD] === undefined ? "" : `reward ${row[REWARD].toPrecision(3)}`),
        el("span", { class: "soft" }, seconds(row[TAU]))));
    details.addEventListener("toggle", () => {
      if (details.open) state.open.add(row[INDEX]); else state.open.delete(row[INDEX]);
      if (details.open && details.childElementCount === 1) {
        details.append(text === undefined
          ? el("p", { class: "note" }, "This chain is left out of the page to keep it small; it is in the run’s samples.")
          : el("div", { class: "chain" }, text));
      }
    });
    details.open = state.open.has(row[INDEX]);
    return el("li", {}, details);
  }

  function renderChains(tau) {
    const problem = problems[state.problem];
    const rows = problem.rows[state.model];
    const count = finished(rows, tau);
    const list = $("chains");
    if (list.dataset.shown === `${state.problem}/${state.model}/${count}`) return;
    list.dataset.shown = `${state.problem}/${state.model}/${count}`;
    const items = rows.slice(0, count).map((row, rank) => chain(row, problem.texts[state.model][rank]));
    list.replaceChildren(...(items.length ? items : [el("li", { class: "empty" }, `No chain of ${models[state.model].name} has ended by ${seconds(tau)}.`)]));
  }

  function renderClock() {
    const tau = budget();
    $("now").textContent = seconds(tau);
    $("budget").setAttribute("aria-valuetext", `${seconds(tau)} per problem`);
    renderTally(tau);
    renderList(tau);
    renderVotes(tau);
    renderChains(tau);
  }

  function choose(index) {
    const problem = problems[index];
    state.problem = index;
    const first = problem.rows[state.model][0];
    state.open = new Set(first ? [first[INDEX]] : []);
    $("meta").textContent = [problem.id, problem.level === null ? "" : `level ${problem.level}`].filter(Boolean).join(" · ");
    $("question").textContent = problem.problem;
    $("gold").textContent = problem.answer;
    $("worked").hidden = !problem.solution;
    $("solution").textContent = problem.solution ?? "";
    $("list").querySelectorAll("button").forEach((one) => one.setAttribute("aria-current", String(Number(one.dataset.index) === index)));
    renderVotes(budget());
    renderChains(budget());
  }

  function setRunning(running) {
    state.running = running;
    $("play").setAttribute("aria-pressed", String(running));
    $("play").replaceChildren(el("span", { "aria-hidden": "true" }, running ? "❚❚" : "▶"), running ? " Stop" : " Let time run");
  }

  function run(previous) {
    const time = $("budget");
    let at = Number(time.value) >= STEPS ? 0 : Number(time.value);
    time.value = at;
    requestAnimationFrame(function frame(now) {
      if (!state.running) return;
      at += ((now - (previous ?? now)) / 8000) * STEPS;
      previous = now;
      if (Math.floor(at) !== Number(time.value)) {
        time.value = Math.min(STEPS, Math.floor(at));
        renderClock();
      }
      if (at >= STEPS) setRunning(false); else requestAnimationFrame(frame);
    });
  }

  function start() {
    const levels = [...new Set(problems.map((problem) => problem.level).filter((level) => level !== null))].sort((a, b) => a - b);
    $("level").append(...levels.map((level) => el("option", { value: level }, String(level))));
    $("level").parentElement.hidden = levels.length < 2;
    $("outcome").append(...OUTCOMES.map(([id, text]) => el("option", { value: id }, text)));
    $("tabs").append(...models.map((model, m) => {
      const input = el("input", { type: "radio", name: "model", value: m });
      input.checked = m === 0;
      return el("label", { class: `s${model.slot}` }, input, key(model));
    }));
    $("tabs").addEventListener("change", (event) => {
      state.model = Number(event.target.value);
      choose(state.problem);
    });
    $("budget").addEventListener("input", () => {
      setRunning(false);
      renderClock();
      followers.forEach((follow) => follow(budget()));
    });
    $("how-label").hidden = !scored;
    $("how").addEventListener("input", renderClock);
    for (const id of ["search", "level", "outcome"]) $(id).addEventListener("input", () => renderList(budget()));
    $("list").addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      choose(Number(button.dataset.index));
      if (matchMedia("(max-width: 54rem)").matches) $("detail").scrollIntoView();
    });
    $("list").addEventListener("keydown", (event) => {
      const item = event.target.closest("li");
      const next = { ArrowDown: item?.nextElementSibling, ArrowUp: item?.previousElementSibling }[event.key];
      if (!next) return;
      event.preventDefault();
      next.querySelector("button").focus();
    });
    $("play").addEventListener("click", () => { setRunning(!state.running); if (state.running) run(); });
    $("app").hidden = false;
    $("budget").value = Math.round((STEPS * Math.log(opening / low)) / Math.log(high / low));
    choose(0);
    renderClock();
  }
  if (problems.length) start();
})();
