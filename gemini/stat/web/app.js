// The page of gemini-stat: shows what the server (or, in a report, the page itself) says about a run.
// Text from runs enters the page as text only, never as markup.
"use strict";
(() => {
  const TIERS = ["device", "host", "disk"];
  const COLORS = { device: "#1f6feb", host: "#2da44e", disk: "#bf8700", model: "#1f6feb", other: "#e16f24" };
  const embedded = document.getElementById("data");
  const state = { rank: null, timelineStep: null, chunkStamp: null, chunks: null, charts: {}, timeline: null };

  const $ = (id) => document.getElementById(id);
  const make = (tag, text, cls) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const fill = (node, ...children) => node.replaceChildren(...children);
  const known = (value) => value !== null && value !== undefined;
  const bytes = (value) => {
    if (!known(value)) return "-";
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let index = 0;
    while (Math.abs(value) >= 1023.95 && index < 4) { value /= 1024; index += 1; }
    return `${value.toFixed(index ? 1 : 0)} ${units[index]}`;
  };
  const percent = (value) => (known(value) ? `${(100 * value).toFixed(1)}%` : "-");
  const seconds = (value) => (!known(value) ? "-" : value < 0.1 ? `${(1e3 * value).toFixed(1)} ms` : `${value.toFixed(2)} s`);
  const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "-");

  function table(head, rows) {
    const node = make("table");
    const top = node.createTHead().insertRow();
    head.forEach((text) => top.append(make("th", text)));
    const body = node.createTBody();
    rows.forEach((cells) => {
      const row = body.insertRow();
      cells.forEach((cell) => {
        const place = row.insertCell();
        if (cell instanceof Node) place.append(cell); else place.textContent = cell;
      });
    });
    return node;
  }

  function bar(tier, of) {
    const node = make("div", null, "bar");
    const share = (value) => `${Math.max(0, Math.min(100, (100 * (value || 0)) / (of.capacity_bytes || 1)))}%`;
    const peak = make("i", null, tier), used = make("b", null, tier);
    peak.style.width = share(of.peak_bytes);
    used.style.width = share(of.used_bytes);
    node.append(peak, used);
    node.title = `${bytes(of.used_bytes)} of ${bytes(of.capacity_bytes)}, peak ${bytes(of.peak_bytes)}`;
    return node;
  }

  const most = (values) => values.filter(known).reduce((a, b) => (known(a) && a > b ? a : b), null);
  const riskMark = (risk) => make("span", percent(risk) + (risk >= 0.85 ? " !" : ""), risk >= 0.85 ? "risk" : "");

  function showTiersOverRanks(all) {
    const rows = TIERS.map((tier) => {
      const of = (name) => most(all.ranks.map((rank) => rank.tiers[tier][name]));
      const used = all.numbers[`${tier}_used_bytes`] || {};
      const fullest = { used_bytes: used.max, peak_bytes: of("peak_bytes"), capacity_bytes: of("capacity_bytes") };
      return [tier, bar(tier, fullest), bytes(used.min), bytes(used.median), bytes(used.max),
        bytes(fullest.capacity_bytes), bytes(fullest.peak_bytes), riskMark(most(all.ranks.map((rank) => rank.oom_risk[tier])))];
    });
    const node = table(["tier", "fullest", "min used", "median", "max", "capacity", "peak", "risk"], rows);
    node.className = "over-ranks";
    fill($("tiers"), node);
  }

  const COLUMNS = [
    ["own part", "own_seconds", seconds], ["for ranks", "wait_seconds", seconds], ["for chunks", "stall_seconds", seconds],
    ["device", "device_used_bytes", bytes], ["host", "host_used_bytes", bytes], ["disk", "disk_used_bytes", bytes],
    ["non-model", "non_model_peak_bytes", bytes], ["process", "rss_bytes", bytes], ["risk", "oom_risk", percent],
  ];

  function stepBar(numbers, longest) {
    const node = make("div", null, "bar"), waiting = make("i", null, "waiting"), own = make("b", null, "own");
    const share = (value) => `${Math.max(0, Math.min(100, (100 * (value || 0)) / (longest || 1)))}%`;
    waiting.style.width = share(numbers.step_seconds);
    own.style.width = share(known(numbers.own_seconds) ? numbers.own_seconds : numbers.step_seconds);
    node.append(waiting, own);
    node.title = `${seconds(numbers.own_seconds)} of its own, ${seconds(numbers.wait_seconds)} waiting for other ranks`;
    return node;
  }

  function showAllRanks(all) {
    $("ranks-section").hidden = !all;
    if (!all) return;
    const slow = all.straggler && all.straggler.ratio >= 1.05 ? all.straggler : null;
    $("straggler").textContent = slow ? `Straggler: rank ${slow.rank}, ${seconds(slow.own_seconds)} of its own a step, ` +
      `${slow.ratio.toFixed(2)} times the median` : "";
    const longest = (all.numbers.step_seconds || {}).max;
    const hosts = new Set(all.ranks.map((rank) => rank.host)).size > 1;
    const spreads = ["min", "median", "max"].map((name) => [name, "", count((all.numbers.step || {})[name]),
      seconds((all.numbers.step_seconds || {})[name]), "",
      ...COLUMNS.map(([, key, show]) => show((all.numbers[key] || {})[name])), ...(hosts ? [""] : [])]);
    const rows = all.ranks.map((rank) => [rankButton(rank.rank), rank.status, count(rank.numbers.step),
      seconds(rank.numbers.step_seconds), stepBar(rank.numbers, longest),
      ...COLUMNS.map(([, key, show]) => show(rank.numbers[key])), ...(hosts ? [rank.host || "-"] : [])]);
    const head = ["rank", "status", "step", "s/step", "own part, waiting for ranks", ...COLUMNS.map(([title]) => title), ...(hosts ? ["machine"] : [])];
    const node = table(head, [...spreads, ...rows]);
    [...node.tBodies[0].rows].forEach((row, index) => {
      const rank = all.ranks[index - 3];
      row.className = index < 3 ? "spread" : [rank.status, slow && rank.rank === slow.rank ? "slow" : ""].join(" ");
    });
    const box = make("div", null, all.ranks.length > 16 ? "scroll" : "");
    box.append(node);
    fill($("ranks"), box);
    if (all.missing.length) {
      $("ranks").append(make("p", `${all.missing.length} more have not begun, or write in the file system of another machine.`, "note"));
    }
  }

  function rankButton(rank) {
    if (embedded) return String(rank);
    const node = make("button", String(rank));
    node.title = `look at rank ${rank} by itself`;
    node.addEventListener("click", () => choose(String(rank)));
    return node;
  }

  function showTiers(snapshot) {
    if (snapshot.all_ranks) { showTiersOverRanks(snapshot.all_ranks); return; }
    const rows = TIERS.map((tier) => {
      const of = snapshot.tiers[tier];
      return [tier, bar(tier, of), bytes(of.used_bytes), bytes(of.capacity_bytes), bytes(of.peak_bytes), riskMark(snapshot.oom_risk[tier])];
    });
    const kinds = [
      `parameters ${bytes(snapshot.model_data.parameter_bytes)}`, `gradients ${bytes(snapshot.model_data.gradient_bytes)}`,
      `optimizer ${bytes(snapshot.model_data.optimizer_bytes)}`, `non-model at its peak ${bytes(snapshot.non_model.peak_bytes)}`,
      `process ${bytes(snapshot.process.rss_bytes)}`,
    ];
    const parts = [table(["tier", "", "used", "capacity", "peak", "risk"], rows), make("p", kinds.join(" · "), "note")];
    const where = snapshot.device_and_host_are_one ? "host" : "device", seen = snapshot.prediction || {};
    const said = seen[`${where}_predicted_bytes`], came = seen[`${where}_measured_bytes`];
    if (said && came) {
      const off = Math.round(100 * (came / said - 1));
      parts.push(make("p", `A step's peak on ${where}: predicted ${bytes(said)}, measured ${bytes(came)} ` +
        `(${off < 0 ? "" : "+"}${off}%)`, "note predicted"));
    }
    if (snapshot.device_and_host_are_one) parts.push(make("p", "Device and host are one RAM: host counts both.", "note"));
    fill($("tiers"), ...parts);
  }

  function chart(id, options, data) {
    const place = $(id);
    const old = state.charts[id];
    if (old) old.destroy();
    fill(place);
    const width = Math.max(280, place.clientWidth || 480);
    state.charts[id] = new uPlot({ width, height: 220, ...options }, data, place);
  }

  const axis = () => ({ stroke: getComputedStyle(document.body).color, grid: { stroke: "#8883", width: 1 } });
  const byteAxis = () => ({ ...axis(), size: 76, values: (_, ticks) => ticks.map(bytes) });
  const fromZero = (_, low, high) => [0, 1.05 * (high || 1)];  // areas must not lie about their height
  const noCharts = () => make("p", "Charts are not built in: run scripts/build-web. The numbers are in the table.", "note");

  function showTimeline(timeline) {
    state.timeline = timeline;
    if (!timeline) {
      fill($("timeline"), make("p", "Not recorded yet: the first step records it.", "note"));
      $("peak").textContent = "";
      return;
    }
    const moments = timeline.moments, tier = `${timeline.tier}_bytes`;
    const peak = moments[timeline.peak_moment] || {};
    $("peak").textContent = `Step ${count(timeline.step)}: peak ${bytes((peak[tier] || 0) + (peak.non_model_bytes || 0))} in ` +
      `${peak.phase || "-"} of ${peak.unit || "the end of the step"}`;
    if (window.uPlot) {
      const model = moments.map((m) => m[tier]), total = moments.map((m) => m[tier] + m.non_model_bytes);
      const label = (_, index) => (index === null ? "" : bytes(total[index]));
      chart("timeline", {
        scales: { x: { time: false }, y: { range: fromZero } },
        axes: [axis(), byteAxis()],
        series: [
          { label: "moment", value: (_, index) => known(index) && moments[index] ? `${index} ${moments[index].phase} ${moments[index].unit || ""}` : "" },
          { label: "with non-model", stroke: COLORS.other, fill: COLORS.other + "66", value: (u, v, s, i) => label(u, i) },
          { label: "model", stroke: COLORS.model, fill: COLORS.model + "99", value: (_, v) => bytes(v) },
        ],
      }, [moments.map((_, i) => i), total, model]);
    } else {
      const top = moments.map((m, i) => [i, m]).sort((a, b) => b[1][tier] + b[1].non_model_bytes - a[1][tier] - a[1].non_model_bytes);
      const rows = top.slice(0, 12).map(([i, m]) => [`${i} ${m.phase} ${m.unit || ""}`, bytes(m[tier]), bytes(m.non_model_bytes)]);
      fill($("timeline"), noCharts(), table(["moment", "model", "non-model"], rows));
    }
  }

  const letters = (text) => {
    let all = "";
    for (const [, times, letter] of (text || "").matchAll(/(\d{1,7})(\D)/g)) {
      all += letter.repeat(Math.min(Number(times), 1 << 20));
      if (all.length > 1 << 20) break;
    }
    return all;
  };

  function showChunks(map) {
    const all = letters(map);
    if (!all) { fill($("chunks"), make("p", "No chunk map recorded yet.", "note")); return; }
    let canvas = $("chunks").querySelector("canvas");
    if (!canvas) { canvas = make("canvas"); fill($("chunks"), canvas); canvas.addEventListener("mousemove", hover); }
    const width = Math.max(280, $("chunks").clientWidth || 480);
    const size = Math.max(3, Math.min(14, Math.floor(Math.sqrt((width * 160) / all.length))));
    const columns = Math.max(1, Math.floor(width / size));
    canvas.width = width;
    canvas.height = Math.ceil(all.length / columns) * size;
    canvas.style.height = `${canvas.height}px`;
    const context = canvas.getContext("2d");
    const home = { d: COLORS.device, h: COLORS.host, k: COLORS.disk };
    [...all].forEach((letter, i) => {
      context.globalAlpha = letter >= "a" ? 0.45 : 1;
      context.fillStyle = letter === ">" ? "#8250df" : letter === "*" ? "#24292f" : home[letter.toLowerCase()] || "#888";
      context.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - 1, size - 1);
    });
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${all.length} chunks: ${map}`);
    state.map = { all, size, columns };
  }

  function hover(event) {
    const { all, size, columns } = state.map;
    const box = event.target.getBoundingClientRect();
    const index = Math.floor((event.clientY - box.top) / size) * columns + Math.floor((event.clientX - box.left) / size);
    const chunk = state.chunks && state.chunks[index];
    if (index >= all.length) return;
    $("chunk").textContent = `chunk ${index} ${all[index]}` + (chunk
      ? `: homes ${bytes(chunk.home_bytes)}, waste ${percent(chunk.waste_ratio)}, ${chunk.parameters.slice(0, 3).join(", ")}` +
        (chunk.parameters.length > 3 ? ` and ${chunk.parameters.length - 3} more` : "") : "");
  }

  function showSteps(steps) {
    if (!steps || steps.step.length === 0) { fill($("steps"), make("p", "No step recorded yet.", "note")); return; }
    if (window.uPlot) {
      chart("steps", {
        scales: { x: { time: false }, y: { range: fromZero }, seconds: { range: fromZero } },
        axes: [axis(), byteAxis(), { ...axis(), side: 1, scale: "seconds", size: 60, values: (_, t) => t.map(seconds) }],
        series: [
          { label: "step" },
          ...TIERS.map((tier) => ({ label: tier, stroke: COLORS[tier], value: (_, v) => bytes(v) })),
          { label: "s/step", stroke: "#8888", scale: "seconds", value: (_, v) => seconds(v) },
        ],
      }, [steps.step, ...TIERS.map((tier) => steps[`${tier}_bytes`]), steps.step_seconds]);
    } else {
      const last = steps.step.map((s, i) => [count(s), ...TIERS.map((t) => bytes(steps[`${t}_bytes`][i])), seconds(steps.step_seconds[i])]);
      const box = make("div", null, "scroll");
      box.append(table(["step", ...TIERS, "s/step"], last.slice(-50).reverse()));
      fill($("steps"), noCharts(), box);
    }
  }

  function showMoves(row) {
    const links = row.links.map((l) => [`${l.src} > ${l.dst}`, bytes(l.bytes_per_step), `${bytes(l.bytes_per_second)}/s`,
      known(l.ceiling_bytes_per_second) ? `${bytes(l.ceiling_bytes_per_second)}/s` : "-"]);
    fill($("moves"), links.length ? table(["link", "a step", "while moving", "measured by bench"], links)
      : make("p", row.window_steps ? "Nothing moves." : "No second step to compare with yet.", "note"));
  }

  function showNeeds(snapshot, row) {
    const needs = snapshot.need, stall = snapshot.stall;
    fill($("needs"),
      table(["resident", "hit", "late", "miss", "not waited for"],
        [[count(needs.resident_count), count(needs.hit_count), count(needs.late_count), count(needs.miss_count), percent(row.hit_ratio)]]),
      table(["waited for", ...TIERS, "a step", "of a step"],
        [["", ...TIERS.map((t) => seconds(stall[`${t}_seconds`])), seconds(row.stall_seconds_per_step), percent(row.stall_ratio)]]));
  }

  function showAdvice(advice) {
    if (!advice.length) { fill($("advice"), make("p", "Nothing to change.", "note")); return; }
    const list = make("ul");
    advice.forEach((item) => {
      const entry = make("li");
      if (item.arguments) {
        const copy = make("button", "copy");
        copy.addEventListener("click", () => navigator.clipboard && navigator.clipboard.writeText(item.arguments));
        entry.append(make("code", item.arguments), " ", copy, " ");
      }
      entry.append(make("span", (item.urgent ? "! " : "") + item.text, item.urgent ? "urgent" : ""));
      list.append(entry);
    });
    fill($("advice"), list);
  }

  function showFacts(snapshot) {
    const rows = [];
    const walk = (facts, prefix) => Object.entries(facts || {}).forEach(([name, value]) => {
      if (value && typeof value === "object") walk(value, `${prefix}${name}.`);
      else if (known(value) && value !== "") rows.push([prefix + name, String(value).slice(0, 120)]);
    });
    walk(snapshot.facts, "");
    fill($("facts"), table(["", ""], rows.slice(0, 30)));
  }

  function showSnapshot(content) {
    const { snapshot, row } = content;
    $("status").textContent = snapshot.status.toUpperCase();
    $("status").className = `status ${snapshot.status}`;
    const all = snapshot.all_ranks;
    const which = all ? ` · ${all.ranks.length} of ${snapshot.world_size} ranks` : snapshot.world_size > 1
      ? ` · rank ${snapshot.rank} of ${snapshot.world_size}` : "";
    $("title").textContent = `${snapshot.name} ${snapshot.run_id} · step ${count(snapshot.step)} · ${seconds(snapshot.step_seconds)}/step${which}`;
    document.querySelectorAll(".of-rank").forEach((node) => { node.textContent = all ? ` of rank ${snapshot.rank}` : ""; });
    showAllRanks(all);
    document.title = `${snapshot.status} ${count(snapshot.step)} gemini-stat`;
    const messages = {
      crashed: `Crashed${snapshot.status_reason ? `: ${snapshot.status_reason}` : ""}`,
      stalled: `Stalled: ${snapshot.status_reason || ""}`,
    };
    $("message").textContent = messages[snapshot.status] || (known(snapshot.step) ? "" : "Warm-up: the first step records the timeline.");
    showTiers(snapshot);
    showChunks(snapshot.chunk_map);
    showMoves(row);
    showNeeds(snapshot, row);
    showAdvice(row.advice);
    showFacts(snapshot);
  }

  function showRanks(ranks, snapshot) {
    $("rank-label").hidden = ranks.length < 2;
    const values = ["all", "worst", ...ranks.map(String)];
    if ($("rank").options.length !== values.length) {
      fill($("rank"), ...values.map((value) => { const o = make("option", value); o.value = value; return o; }));
    }
    $("rank").value = state.rank || (snapshot.all_ranks ? "all" : String(snapshot.rank));
  }

  if (embedded) {
    const content = JSON.parse(embedded.textContent);
    showRanks([], content.snapshot);
    showSnapshot(content);
    showTimeline(content.timeline);
    state.chunks = content.chunks;
    showSteps(content.steps);
    $("connection").textContent = `report of ${new Date(1e3 * content.made_at).toISOString()}`;
    return;
  }

  const api = async (path) => {
    const answer = await fetch(path, { headers: { Accept: "application/json" } });
    return answer.ok ? answer.json() : null;
  };
  const query = () => (state.rank === null ? "" : `?rank=${state.rank}`);

  let source = null;
  async function slow() { showSteps(await api(`api/v1/steps${query()}`)); }
  function listen() {
    if (source) source.close();
    source = new EventSource(`api/v1/events${query()}`);
    source.onopen = () => { $("connection").textContent = "live"; };
    source.onerror = () => { $("connection").textContent = "not connected, trying again"; };
    source.onmessage = async (event) => {
      const content = JSON.parse(event.data);
      if (content.error) { $("message").textContent = content.error; return; }
      showRanks(content.ranks, content.snapshot);
      if (content.chunk_stamp !== state.chunkStamp) {
        state.chunkStamp = content.chunk_stamp;
        const found = await api(`api/v1/chunks${query()}`);
        state.chunks = found && found.chunks;
      }
      showSnapshot(content);
      if (content.timeline_stamp !== state.timelineStep) {
        state.timelineStep = content.timeline_stamp;
        showTimeline(await api(`api/v1/timeline${query()}`));
      }
    };
  }
  function choose(rank) {
    state.rank = rank;
    state.timelineStep = state.chunkStamp = null;
    listen();
    slow();
  }
  $("rank").addEventListener("change", () => choose($("rank").value));
  listen();
  slow();
  setInterval(slow, 15000);
})();
