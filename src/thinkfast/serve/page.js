"use strict";

const $ = (selector, within = document) => within.querySelector(selector);
const SHOWN = 6; // rows of votes
let running = null; // an AbortController while models think

function headers() {
  const key = $("#key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function trouble(text) {
  $("#trouble").textContent = text;
  $("#trouble").hidden = !text;
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("#secret").hidden = false;
    return;
  }
  if (!response.ok) return trouble(await complaint(response));
  const names = (await response.json()).data.map((row) => row.id);
  const box = $("#models");
  box.querySelectorAll("label").forEach((label) => label.remove());
  names.forEach((name, index) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "checkbox", value: name, checked: index < 2 });
    label.append(input, name);
    box.append(label);
  });
  box.hidden = names.length < 2;
  trouble("");
}

function node(tag, text, className = "") {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

function showVotes(run, votes) {
  const most = votes.reduce((sum, row) => sum + row.votes, 0);
  const list = $(".votes", run);
  votes.slice(0, SHOWN).forEach((row, at) => {
    const item = list.children[at] || list.appendChild(document.createElement("li"));
    if (!item.children.length) {
      const track = document.createElement("span");
      track.append(node("span", "", "bar"));
      item.append(node("span", "", "name"), track, node("span", "", "count"));
    }
    $(".name", item).textContent = row.answer;
    $(".name", item).title = row.answer;
    $(".bar", item).style.width = `${(100 * row.votes) / most}%`;
    $(".count", item).textContent = row.votes;
  });
  while (list.children.length > Math.min(votes.length, SHOWN)) list.lastChild.remove();
}

function showChain(run, chain) {
  const item = document.createElement("li");
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  const said = chain.answer === null ? (chain.finish_reason === "deadline" ? "cut off" : "no answer") : chain.answer;
  summary.append(node("b", said), node("span", `${chain.tokens} tokens`), node("span", `${chain.seconds.toFixed(2)} s`));
  details.append(summary, node("pre", chain.text));
  item.append(details);
  $(".chains", run).append(item);
  $("h3", run).hidden = false;
  $("h3 .soft", run).textContent = $(".chains", run).children.length;
}

function showEnd(run, found, budget) {
  const answer = $(".answer", run);
  const late = found.seconds > 0.95 * budget ? "time is up" : "no other chain would end in time";
  const ends = { decided: found.strategy === "adaptive" ? "the vote is decided" : "no more chains could change it", samples: "all chains drawn", deadline: late, closed: "the server stopped" };
  answer.textContent = found.answer === null ? "No answer in this time" : found.answer;
  const share = `${Math.round(100 * found.confidence)} % of the votes, `;
  const told = `${found.answer === null ? "" : share}${found.samples} chains, ${found.seconds.toFixed(2)} s, ${ends[found.stopped]}`;
  answer.append(node("small", told));
  showVotes(run, found.votes);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
  }
}

async function think(name, problem, budget, strategy, signal) {
  const run = $("#run").content.firstElementChild.cloneNode(true);
  $("#runs").append(run);
  $("h2", run).textContent = name;
  run.setAttribute("aria-label", name);
  const started = performance.now();
  const tick = () => {
    const seconds = Math.min((performance.now() - started) / 1000, budget);
    $("progress", run).value = seconds / budget;
    $(".clock", run).textContent = `${seconds.toFixed(1)} of ${budget} s`;
  };
  const clock = setInterval(tick, 100);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal,
      body: JSON.stringify({
        model: name, messages: [{ role: "user", content: problem }], temperature: 0.8,
        time_budget: budget, strategy, stream: true, return_samples: true,
      }),
    });
    if (response.status === 401) $("#secret").hidden = false;
    if (!response.ok) throw new Error(await complaint(response));
    let ended = false;
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const news = event.thinkfast;
      if (!news) continue;
      if (news.chain) {
        showChain(run, news.chain);
        showVotes(run, news.votes);
        if (news.votes.length) $(".answer", run).textContent = news.votes[0].answer;
      } else {
        showEnd(run, news, budget);
        ended = true;
      }
    }
    if (!ended) throw new Error("The server stopped before there was an answer.");
    run.dataset.state = "done";
  } catch (error) {
    $(".answer", run).textContent = "";
    if (error.name !== "AbortError") {
      trouble(error.message);
      run.dataset.state = "failed";
    } else {
      $(".answer", run).append(node("small", "stopped"));
      run.dataset.state = "stopped";
    }
  } finally {
    clearInterval(clock);
    tick();
  }
}

async function ask(event) {
  event.preventDefault();
  if (running) return running.abort();
  trouble("");
  if (!$("#models input")) await listModels();
  const names = [...document.querySelectorAll("#models input:checked")].map((input) => input.value);
  if (!names.length) return trouble($("#secret").hidden ? "Choose a model." : "Type an API key of this server.");
  $("#runs").replaceChildren();
  running = new AbortController();
  $("#go").textContent = "Stop";
  const budget = Number($("#budget").value);
  const one = (name) => think(name, $("#problem").value, budget, $("#strategy").value, running.signal);
  await Promise.all(names.map(one));
  running = null;
  $("#go").textContent = "Think";
}

$("#ask").addEventListener("submit", ask);
$("#key").addEventListener("change", listModels);
$("#problem").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#ask").requestSubmit();
});
listModels().catch(() => trouble("The server cannot be reached."));
