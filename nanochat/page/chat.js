"use strict";
// The page: chats, which this browser keeps, and runs, of which the server tells. In order: making elements, keeping, the
// server, chats, replies, turns on the screen, rich text, scrolling, the list, files, the box, settings, runs, the start.
//
// Promises: nothing that a model, a user, a file or the storage says is run; HTML comes from the server alone, is checked
// again where it tells what they said, and is never kept; what came of a reply and what was typed outlive the page; tabs
// don't overwrite each other's chats; the page never scrolls against its reader.

const at = id => document.getElementById(id);
const [main, log, box, spoken] = ["main", "log", "box", "spoken"].map(at);

// ---- Making elements

// make("p.note", { title: "x" }, "text"): attributes may be left out; those that begin with "on" are listeners.
const make = (kind, ...rest) => build(tag => document.createElement(tag), kind, rest);
const draw = (kind, ...rest) => build(tag => document.createElementNS("http://www.w3.org/2000/svg", tag), kind, rest);

function build(create, kind, rest) {
  const [tag, ...classes] = kind.split("."), made = create(tag);
  const attributes = rest[0] && rest[0].constructor === Object ? rest.shift() : {};
  if (classes.length) made.setAttribute("class", classes.join(" "));
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false) made.setAttribute(name, value);
  }
  made.append(...rest);
  return made;
}

const icon = name => draw("svg.icon", { "aria-hidden": "true", viewBox: "0 0 24 24" }, draw("path", { d: ICONS[name] }));
const button = (text, onclick, look = "quiet") => make(`button.${look}`, { type: "button", onclick }, text);
const iconButton = (name, label, onclick) =>
  make("button.plain", { type: "button", "aria-label": label, title: label, onclick }, icon(name));
const copyButton = (label, text) => iconButton("copy", label, event => copy(text(), event.currentTarget));
const ICONS = {
  logo: "M5 3h14a3 3 0 0 1 3 3v8a3 3 0 0 1-3 3h-8l-5 4v-4a3 3 0 0 1-4-3V6a3 3 0 0 1 3-3z",
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h16",
  sliders: "M4 7h9m5 0h2M4 17h2m5 0h9M13 7a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0M6 17a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0",
  more: "M5 12h1m6 0h1m5 0h1",
  up: "M12 19V5m-6 6 6-6 6 6",
  down: "M12 5v14m-6-6 6 6 6-6",
  stop: "M7 7h10v10H7zm2 2h6v6H9zm2 2h2v2h-2z",
  copy: "M9 9h11v11H9zM15 6V4H4v11h2",
  check: "m5 13 4 4L19 7",
  edit: "m15 5 4 4L8 20H4v-4z",
  again: "M19 8a8 8 0 1 0 1 5M20 4v5h-5",
  left: "m14 6-6 6 6 6", right: "m10 6 6 6-6 6",
  close: "m6 6 12 12M18 6 6 18",
  tool: "M5 3h14v18H5zM9 7h6M9 12h1m4 0h1M9 16h1m4 0h1",
};

const changing = button => (button.classList.add("change"), button);  // the chat: not there while a reply comes
const count = number => number.toLocaleString();

// A line above the chat, until it is closed or another takes its place.
function notify(text, ...buttons) {
  const close = iconButton("close", "Close this note", () => { at("note").hidden = true; });
  at("note").replaceChildren(make("span", text), ...buttons, close);
  at("note").hidden = false;
}

// Makes these the children, and moves none that is right: a selection and the focus stay.
function arrange(parent, wanted) {
  [...parent.children].filter(child => !wanted.includes(child)).forEach(child => child.remove());
  wanted.forEach((child, i) => {
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] || null);
  });
}

// An element for a thing, made again only when its state has changed.
function remade(known, thing, state, action) {
  const text = state.join();
  if (!known.has(thing) || known.get(thing).state !== text) known.set(thing, { state: text, ...action() });
  return known.get(thing).root;
}

// ---- Keeping

const CHAT = "nanochat:chat:", DRAFT = "nanochat:draft:", TOKEN = "nanochat:token", SAMPLING = "nanochat:sampling";
const local = keeper("localStorage");      // chats, for all tabs
const session = keeper("sessionStorage");  // what is being typed and the token, for this tab

// What the storage refuses, because it is full or switched off, is held in memory, and that is said.
function keeper(name) {
  const held = new Map();
  let store = null;
  try {
    store = window[name];
  } catch { /* switched off */ }
  const put = (key, text) => {
    held.set(key, text);
    try {
      store.setItem(key, text);
      held.delete(key);
    } catch { /* full */ }
    return !held.has(key);
  };
  return {
    get: key => held.get(key) ?? (store && store.getItem(key)),
    set: (key, text) => put(key, text) || cannotKeep(),
    remove(key) {
      held.delete(key);
      if (store) store.removeItem(key);
      for (const [other, text] of [...held]) put(other, text);  // there is more room now
    },
    keys: prefix => [...new Set([...held.keys(), ...Object.keys(store || {})])].filter(key => key.startsWith(prefix)),
  };
}

function cannotKeep() {
  const what = "This browser’s storage is full or switched off: what is new here is lost when the page is closed.";
  notify(what, button("Export all", exportAll));
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

// ---- The server

let health = {};  // what the server said of itself: model, context, limits, defaults

// A token in the address is for this tab, and not for the history or somebody who looks on.
function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  session.set(TOKEN, token);
  history.replaceState(null, "", location.pathname + location.search);
}

// A response that is fine; throws an Error whose message can be shown.
async function ask(path, options = {}) {
  const token = session.get(TOKEN), headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error instanceof TypeError ? new Error("The server can’t be reached.") : error;
  }
  if (response.status === 401 && !at("locked").open) at("locked").showModal();
  if (response.ok) return response;
  const { error } = parse(await response.text()) || {};
  throw new Error((error && error.message) || error || `The server answered ${response.status}.`);
}

const post = (path, content, signal) => ask(path, { method: "POST", body: JSON.stringify(content), signal });

// Events of a response body. A read may end anywhere, also inside an event or a character.
async function* readEvents(body) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data:")) yield JSON.parse(block.slice(5));
    }
    if (done) return;
  }
}

async function greet() {
  try {
    health = await (await ask("health")).json();
  } catch {
    health = { model: "server not reachable" };
  }
  at("model").textContent = health.model;
  showUsed();
}

// ---- Chats as data
//
// A chat's turns are a tree, so that asking again and editing lose nothing: each has a `parent` (an index, -1 = none),
// what the `user` said, the `parts` of the reply, how that came to its `end`, and `counts`. `leaf` is the last turn of
// the path that is shown.

const unique = () => Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
const newChat = () => ({ id: unique(), rev: "", title: "", system: "", turns: [], leaf: -1 });

let chat = newChat();       // the one that is shown; kept from its first turn on
const chats = new Map();    // by id, all that are kept
const running = new Map();  // chat: { turn, controller } of the reply that is coming

const isShown = other => other === chat;
const isText = turn => turn.parts.every(part => part.type === "text");
const plainText = turn => turn.parts.filter(part => part.type === "text").map(part => part.text).join("");
const isHeard = turn => turn.parts.length > 0 && turn.end !== "error";  // by the model: half turns it never hears of
const titleOf = chat => chat.title || (chat.turns[0] ? chat.turns[0].user.trim().slice(0, 80) : "New chat");

function pathOf(chat, leaf = chat.leaf) {
  const path = [];
  for (let i = leaf; i >= 0; i = chat.turns[i].parent) path.unshift(i);
  return path;
}

const versionsOf = (chat, index) =>
  [...chat.turns.keys()].filter(i => chat.turns[i].parent === chat.turns[index].parent);

// The newest end of what follows a turn.
function leafUnder(chat, index) {
  const next = chat.turns.findLastIndex(turn => turn.parent === index);
  return next < 0 ? index : leafUnder(chat, next);
}

// What the model is told, and what {"messages": [...]} in training data is.
function messagesOf(chat, leaf = chat.leaf) {
  const said = pathOf(chat, leaf).map(i => chat.turns[i]).filter(isHeard).flatMap(turn => [
    { role: "user", content: turn.user },
    { role: "assistant", content: isText(turn) ? plainText(turn) : turn.parts },
  ]);
  return chat.system ? [{ role: "system", content: chat.system }, ...said] : said;
}

// The newest messages that the server's limits allow, in whole turns; a system message and the last one always.
function recent(messages, limits) {
  const size = ({ content }) => [content].flat().reduce((sum, part) => sum + (part.text ?? part).length, 0);
  const system = messages.filter(message => message.role === "system");
  let kept = [...system, messages.at(-1)];
  for (let i = messages.length - 3; limits && i >= system.length; i -= 2) {
    const turn = messages.slice(i, i + 2), more = [...system, ...turn, ...kept.slice(system.length)];
    const characters = more.map(size).reduce((a, b) => a + b);
    if (more.length > limits.messages || characters > limits.characters
        || Math.max(...turn.map(size)) > limits.message_characters) break;
    kept = more;
  }
  return limits ? kept : messages;
}

// A chat from storage or a file, or null for something else.
function asChat(value) {
  const isPart = part => ["text", "python", "python_output"].includes(part?.type) && typeof part.text === "string";
  const isTurn = (turn, i) => typeof turn?.user === "string" && turn.parts?.every?.(isPart) && turn.parent >= -1 && turn.parent < i;
  const isChat = value?.turns?.every?.(isTurn) && value.leaf in value.turns;
  return isChat ? { ...newChat(), ...value, title: `${value.title}`, system: `${value.system}` } : null;
}

function loadChats() {
  const found = local.keys(CHAT).map(key => asChat(parse(local.get(key))));
  for (const chat of found.filter(Boolean)) chats.set(chat.id, chat);
  const unread = found.length - chats.size;
  if (unread) notify(`${unread} of the chats that this browser keeps can’t be read; they were left as they are.`);
}

// Keeps a chat. Where another tab has written it since, ours goes on as a chat of its own.
function save(chat) {
  const kept = parse(local.get(CHAT + chat.id));
  if (kept && kept.rev !== chat.rev) fork(chat, kept);
  chat.rev = unique();
  chats.set(chat.id, chat);
  local.set(CHAT + chat.id, JSON.stringify(chat));
  showList();
}

function fork(chat, kept) {
  chats.set(chat.id, asChat(kept) || chat);
  Object.assign(chat, { id: unique(), title: `${titleOf(chat)} (2)` });
  if (isShown(chat)) history.replaceState(null, "", `#chat=${chat.id}`);
  notify("Another tab has changed this chat; here it goes on as a copy.");
}

function forget(chat) {
  chats.delete(chat.id);
  local.remove(CHAT + chat.id);
  showList();
}

// What another tab did.
function onStorage({ key, newValue }) {
  if (!key || !key.startsWith(CHAT)) return;
  const id = key.slice(CHAT.length), mine = chats.get(id), theirs = asChat(parse(newValue));
  if (running.has(mine)) return;  // it forks when it is saved
  if (!theirs) chats.delete(id);
  else chats.set(id, mine ? Object.assign(mine, theirs) : theirs);
  if (theirs && isShown(mine)) showChat();
  showList();
}

// ---- Replies

// A new turn: after the leaf, or as another version of a turn.
function say(text, version = null) {
  const from = chat.leaf, parent = version === null ? chat.leaf : chat.turns[version].parent;
  const turn = { parent, user: text, parts: [], end: null, at: Date.now() };
  chat.leaf = chat.turns.push(turn) - 1;
  run(chat, turn, from);
}

async function run(chat, turn, from) {
  const controller = new AbortController();
  running.set(chat, { turn, controller });
  follow = true;
  save(chat);
  history.replaceState(null, "", `#chat=${chat.id}`);
  showChat();
  focusBox();
  spoken.textContent = "The reply is coming.";
  const keeping = setInterval(save, 1000, chat);
  try {
    await receive(chat, turn, controller.signal);
    if (!turn.parts.length) throw new Error("The model ended its reply before it said anything.");
  } catch (error) {
    turn.end = controller.signal.aborted ? controller.signal.reason : "error";
    turn.problem = error instanceof TypeError ? "The connection to the server was lost." : error.message;
  }
  clearInterval(keeping);
  running.delete(chat);
  finish(chat, turn, from);
}

// The reply's events, into the turn and onto the screen.
async function receive(chat, turn, signal) {
  const all = [...messagesOf(chat, turn.parent), { role: "user", content: turn.user }];
  const messages = recent(all, health.limits), response = await post("chat/completions", { messages, ...sampling() }, signal);
  turn.leftOut = all.length - messages.length;
  let first = 0;
  for await (const event of readEvents(response.body)) {
    signal.throwIfAborted();
    if (event.error) throw new Error(event.error.message || event.error);
    if (event.done) return settle(turn, event, first && (performance.now() - first) / 1000);
    if (event.left_out) turn.leftOut += event.left_out;
    const line = views.get(turn)?.waiting.lastChild;
    if (line && "waiting" in event) line.textContent = event.waiting ? `${event.waiting} before you` : "";
    if (event.kind) hear(turn, event.kind, event.token);
    if (event.kind) first ||= performance.now();
  }
  throw new Error("The connection ended before the reply did.");
}

function settle(turn, event, seconds) {
  turn.counts = { prompt: event.prompt_tokens, reply: event.completion_tokens, seconds };
  turn.end = event.finish_reason;
  if (isText(turn)) rendered.set(markedText(turn), event.html);
}

function hear(turn, kind, text) {
  const last = turn.parts.at(-1), view = views.get(turn);
  if (last && last.type === kind) last.text += text;
  else turn.parts.push({ type: kind, text });
  if (!view) return;
  view.waiting.hidden = true;
  showPiece(view, kind, text);
  followSoon();
}

// The end of a reply. One that was stopped before it said anything did not happen: its text goes back to the box.
function finish(chat, turn, from) {
  const isNothing = turn.end === "stopped" && !turn.parts.length && chat.leaf !== from;
  if (isNothing) {
    if (isShown(chat) && from === turn.parent) box.value = [turn.user, box.value].filter(Boolean).join("\n");
    chat.turns.pop();
    chat.leaf = from;
  }
  if (chats.get(chat.id) === chat) (chat.turns.length ? save : forget)(chat);
  if (!isShown(chat)) return;
  spoken.textContent = isNothing ? "Stopped." : turn.end === "error" ? turn.problem : `nanochat said: ${plainText(turn)}`;
  if (document.activeElement === at("stop")) box.focus();  // the button is about to go
  showChat();
  typed();
}

// A failed turn once more, in its place.
const retry = (chat, index) => run(chat, Object.assign(chat.turns[index], { parts: [], end: null, counts: null }), index);

const stopReply = () => running.has(chat) && running.get(chat).controller.abort("stopped");

// ---- Turns on the screen

const views = new Map();  // turn: its elements, of the turns of the shown chat
const ENDS = {
  null: "Not finished: it comes in another tab, or was cut off.",
  stopped: "Stopped",
  cut: "Cut off: the page was left while this came.",
  cancelled: "The server ended the reply.",
  length: "Cut off: the reply reached its greatest length.",
};

function showChat() {
  const path = pathOf(chat), busy = running.has(chat);
  main.classList.toggle("empty", !path.length);
  main.classList.toggle("busy", busy);
  at("welcome").hidden = path.length > 0;
  arrange(log, path.map(index => showTurn(chat, index)));
  showTitle();
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  showUsed();
  showList();
  renderShown();
  followSoon();
}

function showTitle() {
  at("title").textContent = isRuns() ? "Runs" : titleOf(chat);
  document.title = chat.turns.length || isRuns() ? `${at("title").textContent} · nanochat` : "nanochat";
}

function showTurn(chat, index) {
  const turn = chat.turns[index], coming = running.get(chat)?.turn === turn;
  return remade(views, turn, [turn.end, coming, isHeard(turn) || index === chat.leaf, versionsOf(chat, index)], () => {
    const view = { user: make("div.text", { dir: "auto" }, turn.user), reply: make("div.text", { dir: "auto" }) };
    view.waiting = make("div.waiting", make("i"), make("i"), make("i"), make("span"));
    view.waiting.hidden = !coming || turn.parts.length > 0;
    for (const part of turn.parts) showPiece(view, part.type, part.text);
    view.root = make(isHeard(turn) || coming ? "article.turn" : "article.turn.unheard",
      make("div.said.user", make("h2.unseen", "You said"), view.user), make("div.tools.end", ...userTools(chat, index)),
      make("div.said", make("h2.unseen", "nanochat said"), view.reply), view.waiting, ...(coming ? [] : below(chat, index)));
    return view;
  });
}

function userTools(chat, index) {
  return [...showVersions(chat, index, true), copyButton("Copy this message", () => chat.turns[index].user),
    changing(iconButton("edit", "Edit and send again", () => editTurn(index)))];
}

// What stands below a reply: notes, buttons, counts.
function below(chat, index) {
  const turn = chat.turns[index], { reply, seconds } = turn.counts || {}, notes = [];
  const note = (text, look = "", ...buttons) => text && notes.push(make(`div.note${look}`, make("span", text), ...buttons));
  const last = index === chat.leaf;
  if (turn.end === "error") note(turn.problem, ".error", ...(last ? [["Retry", () => retry(chat, index)], ["Edit", () => editTurn(index)]] : [])
    .map(([name, action]) => changing(button(name, action))));
  else note(ENDS[turn.end]);
  if (turn.leftOut) note(`The model no longer sees the first ${turn.leftOut} messages: its context is full.`);
  if (!isHeard(turn) && !last) note("Not part of the conversation");
  const speed = seconds > 0.05 && reply > 1 ? ` · ${count(Math.round((reply - 1) / seconds))} tokens/s` : "";
  const tools = turn.end === "error" ? [] : [copyButton("Copy this reply", () => plainText(turn)),
    changing(iconButton("again", "Ask again", () => say(turn.user, index)))];
  const told = make("span.muted", reply ? `${count(reply)} tokens${speed}` : "");
  return [...notes, make("div.tools", ...tools, ...showVersions(chat, index, false), told)];
}

// ‹ 2 of 3 ›, beside what differs: the message where it was edited, or else the reply.
function showVersions(chat, index, ofUser) {
  const versions = versionsOf(chat, index), place = versions.indexOf(index);
  const edited = versions.some(i => chat.turns[i].user !== chat.turns[index].user);
  if (versions.length < 2 || edited !== ofUser) return [];
  const arrow = (name, label, to) =>
    Object.assign(changing(iconButton(name, label, () => choose(chat, to))), { disabled: to === undefined });
  return [arrow("left", "Earlier version", versions[place - 1]),
    make("span.muted", `${place + 1} of ${versions.length}`),
    arrow("right", "Later version", versions[place + 1])];
}

function choose(chat, index) {
  chat.leaf = leafUnder(chat, index);
  follow = false;
  save(chat);
  showChat();
  focusBox();
}

// Appends a piece to a reply that is shown as plain text. A tool call and its result share a folded block.
function showPiece(view, kind, text) {
  if (view.kind !== kind) {
    const isResult = kind === "python_output" && view.kind === "python";
    if (kind !== "text" && !isResult) view.reply.append((view.tool = toolBlock()).root);
    view.targets = kind === "text" ? [view.reply.appendChild(make("span"))] : view.tool[kind]();
    view.kind = kind;
  }
  for (const target of view.targets) target.append(text);
}

// 12*3 = 36, and both in full when it is open.
function toolBlock() {
  const summary = make("summary", { title: "The model asked the calculator" }, icon("tool"));
  const root = make("details.tool", summary);
  const row = (title, sign) => {
    const [short, long] = [make("code"), make("pre", { dir: "ltr", tabindex: "0" })];
    summary.append(sign, short);
    root.append(make("span.muted", title), long);
    return [short, long];
  };
  return { root, python: () => row("Asked the calculator", ""), python_output: () => row("Its answer", " = ") };
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not a secure context, such as plain HTTP on a network
    const area = document.body.appendChild(make("textarea.unseen", text));
    area.select();
    document.execCommand("copy");
    area.remove();
    pressed.focus();
  }
  pressed.classList.add("done");
  setTimeout(() => pressed.classList.remove("done"), 1500);
  spoken.textContent = "Copied.";
}

// ---- Rich text: the server makes HTML of a reply's Markdown, and here only what is known comes through

const policy = window.trustedTypes?.createPolicy("nanochat", { createHTML: html => html });
const trusted = html => (policy ? policy.createHTML(html) : html);
const TAGS = `p br hr h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code em strong s del a table thead tbody tr th td span`.split(" ");
const PLACE = "\uFFFC";      // stands for a tool call in the text that is rendered
const rendered = new Map();  // Markdown: its HTML, until the page goes

function markedText(turn) {
  const isResult = i => turn.parts[i].type === "python_output" && i > 0 && turn.parts[i - 1].type === "python";
  const marked = (part, i) => part.type === "text" ? part.text.replaceAll(PLACE, "\uFFFD") : isResult(i) ? "" : PLACE;
  return turn.parts.map(marked).join("");
}

// Renders what is shown and isn't rendered yet, the newest first.
async function renderShown() {
  const turns = pathOf(chat).map(i => chat.turns[i]).filter(turn => turn.end && turn.parts.length).reverse();
  for (const turn of turns) {
    const text = markedText(turn), view = views.get(turn);
    try {
      if (!rendered.has(text)) rendered.set(text, (await (await post("render", { text })).json()).html);
    } catch {
      return;  // it stays plain
    }
    if (!view.reply.classList.contains("rich")) showRich(view, rendered.get(text));
  }
}

function showRich(view, html) {
  const content = cleaned(html), tools = [...view.reply.querySelectorAll(":scope > .tool")];
  frame(content);
  for (const node of textNodes(content)) {
    const [first, ...rest] = node.data.split(PLACE);
    if (rest.length) node.replaceWith(first, ...rest.flatMap(text => [tools.shift() || "", text]));
  }
  view.reply.replaceChildren(content, ...tools);
  view.reply.classList.add("rich");
  followSoon();
}

// The elements and attributes that are known, without any that could run, load or look like a part of the page.
function cleaned(html) {
  const template = document.createElement("template");
  template.innerHTML = trusted(html);
  for (const node of template.content.querySelectorAll("*")) {
    const isKnown = TAGS.includes(node.localName) && node instanceof HTMLElement;
    if (!isKnown) node.replaceWith(node.textContent);
    for (const { name, value } of [...node.attributes]) {
      if (!isSafe(node.localName, name, value)) node.removeAttribute(name);
    }
    if (node.localName === "a") Object.assign(node, { target: "_blank", rel: "noopener noreferrer nofollow" });
  }
  return template.content;
}

function isSafe(tag, name, value) {
  if (name === "href") return tag === "a" && /^(https?:|mailto:)/i.test(value);
  if (name === "class") return /^(language-[\w+#.-]+|align-\w+|[a-z][a-z0-9]?)$/.test(value);  // as pygments names tokens
  return name === "start" && tag === "ol";
}

function textNodes(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) found.push(walker.currentNode);
  return found;
}

// Code with its language and a button to copy it; what is wide scrolls, by keys too; text runs in its own direction.
function frame(content) {
  for (const block of content.children) block.dir = "auto";
  for (const pre of content.querySelectorAll("pre")) {
    const language = /language-(\S+)/.exec(pre.firstElementChild?.className), whole = make("div.code", { dir: "ltr" });
    const press = button("Copy", event => copy(pre.textContent, event.currentTarget), "plain");
    pre.replaceWith(whole);
    pre.tabIndex = 0;
    whole.append(make("div.bar", make("span", language ? language[1] : "text"), press), pre);
  }
  for (const table of content.querySelectorAll("table")) {
    const whole = make("div.scroll", { tabindex: "0" });
    table.before(whole);
    whole.append(table);
  }
}

// ---- Scrolling: the log follows its end until the reader goes up by any means, and again once the reader is back there

let follow = true, isSoon = false;
let seen = { top: 0, height: 0 };  // at the last look, so that what the page did itself is not taken for the reader

const isAtEnd = () => main.scrollHeight - main.scrollTop - main.clientHeight < 4;

function toEnd() {
  main.scrollTop = main.scrollHeight;
  seen = { top: main.scrollTop, height: main.scrollHeight };
}

function followSoon() {
  if (isSoon) return;
  isSoon = true;
  requestAnimationFrame(() => {
    isSoon = false;
    if (follow && !isRuns()) toEnd();
    at("end").hidden = follow || isAtEnd();
  });
}

function onScroll() {
  const { scrollTop: top, scrollHeight: height } = main;
  if (top < seen.top && height >= seen.height) follow = false;
  else if (top > seen.top && isAtEnd()) follow = true;
  seen = { top, height };
  at("end").hidden = follow || isAtEnd();
}

function onWheel(event) {
  if (event.deltaY < 0 && main.scrollTop > 0) follow = false;  // at once: a scroll of a few pixels takes some frames
}

// ---- The list of chats

const lines = new Map();  // chat: its line

function showList() {
  const wanted = at("search").value.trim().toLowerCase();
  const has = chat => [titleOf(chat), ...chat.turns.flatMap(turn => [turn.user, plainText(turn)])]
    .some(text => text.toLowerCase().includes(wanted));
  const found = [...chats.values()].filter(has).sort((a, b) => b.turns.at(-1).at - a.turns.at(-1).at);
  arrange(at("list"), found.map(showLine));
  at("none").hidden = found.length > 0;
  at("none").textContent = wanted ? "No chat has that." : "Chats are kept in this browser only.";
  at("tab-chat").href = chat.turns.length ? `#chat=${chat.id}` : "#";
}

function showLine(chat) {
  const title = titleOf(chat), current = isShown(chat) && "page", coming = running.has(chat);
  return remade(lines, chat, [chat.id, title, current, coming], () => {
    const link = make("a", { href: `#chat=${chat.id}`, dir: "auto", title, "aria-current": current }, title);
    if (coming) link.append(make("i.dot"), make("span.unseen", ", a reply is coming"));
    const small = (text, action) => button(text, action, "plain");
    const more = make("details", make("summary", { "aria-label": `More for ${title}` }, icon("more")),
      small("Rename", () => rename(root, chat)), small("JSON", () => download(chat, "json", asJson(chat))),
      small("Markdown", () => download(chat, "md", asMarkdown(chat))), small("Delete", () => discard(chat)));
    const root = make("li", link, more);
    return { root };
  });
}

function rename(line, chat) {
  const input = make("input", { value: titleOf(chat), "aria-label": "New name", maxlength: "80", dir: "auto" });
  input.addEventListener("keydown", event => {
    if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
    event.stopPropagation();
    if (event.key === "Escape") input.value = titleOf(chat);
    input.blur();
  });
  input.addEventListener("blur", () => {
    if (input.value.trim() !== titleOf(chat)) chat.title = input.value.trim();
    lines.delete(chat);
    save(chat);
    showTitle();
  }, { once: true });
  line.replaceChildren(input);
  input.select();
}

function discard(chat) {
  running.get(chat)?.controller.abort("stopped");
  forget(chat);
  notify(`Deleted “${titleOf(chat)}”.`, button("Undo", () => {
    at("note").hidden = true;
    save(chat);
    location.hash = `chat=${chat.id}`;
  }));
  if (isShown(chat)) location.hash = "";
}

// ---- Files

const asJson = chat => JSON.stringify({ messages: messagesOf(chat) });

function asMarkdown(chat) {
  const marked = part => part.type === "text" ? part.text : `${part.type === "python" ? "" : " = "}\`${part.text}\``;
  const told = pathOf(chat).map(i => chat.turns[i])
    .map(turn => `**You**\n\n${turn.user}\n\n**nanochat**\n\n${turn.parts.map(marked).join("")}`);
  return [`# ${titleOf(chat)}`, chat.system, ...told].filter(Boolean).join("\n\n") + "\n";
}

function download(chat, ending, text) {
  const name = titleOf(chat).replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  const href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  make("a", { href, download: `${name}.${ending}` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}

// One chat a line, which --mixture=FILE reads too.
function exportAll() {
  const told = [...chats.values()].filter(chat => messagesOf(chat).length > 1);
  download({ title: "nanochat chats" }, "jsonl", told.map(asJson).join("\n") + "\n");
}

// ---- The box, and what is being typed: kept for each chat and tab

const isPhone = matchMedia("(max-width: 30rem), (hover: none) and (pointer: coarse)");
const draftKey = () => DRAFT + (chat.turns.length ? chat.id : "new");
let editing = null;  // the turn that what is typed will be a version of
let before = "";     // what was in the box when that began

// After every change of the box.
function typed() {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  at("send").disabled = !box.value.trim();
  at("editing").hidden = editing === null;
  const draft = { text: box.value, editing, before, system: chat.turns.length ? "" : chat.system };
  if (draft.text || draft.system || before) session.set(draftKey(), JSON.stringify(draft));
  else session.remove(draftKey());
}

function takeDraft() {
  const draft = parse(session.get(draftKey())) || {};
  box.value = draft.text || "";
  before = draft.before || "";
  editing = draft.editing in chat.turns ? draft.editing : null;
  if (!chat.turns.length) chat.system = draft.system || "";
  typed();
}

function editTurn(index) {
  if (editing === null) before = box.value;
  editing = index;
  box.value = chat.turns[index].user;
  typed();
  box.focus();
}

// Ends editing; what had been typed before comes back.
function endEdit() {
  box.value = before;
  before = "";
  editing = null;
  typed();
}

function send() {
  const text = box.value.trim(), version = editing;
  if (!text || running.has(chat)) return;
  endEdit();
  session.remove(draftKey());  // a new chat's has no id yet
  say(text, version);
  typed();
}

// On a phone the keyboard would come up and hide what there is to read.
function focusBox() {
  if (!isPhone.matches) box.focus();
}

function showUsed() {
  const counts = pathOf(chat).map(i => chat.turns[i].counts).findLast(Boolean), { context } = health;
  const used = counts && context ? counts.prompt + counts.reply : 0;
  at("used").textContent = used ? `${Math.round((100 * used) / context)} % of ${count(context)} tokens used` : "";
}

function showKeys() {
  box.enterKeyHint = isPhone.matches ? "enter" : "send";
  at("keys").textContent = isPhone.matches ? "" : "Enter sends, Shift-Enter starts a new line";
}

// ---- Settings

const FIELDS = {  // what it is called, what it does, from, to, step
  temperature: ["Temperature", "0 = always the likeliest token", 0, 2, "any"],
  top_p: ["Top-p", "tokens that make up this share; 1 = all", 0, 1, "any"],
  top_k: ["Top-k", "so many of the likeliest tokens", 1, 200, 1],
  max_tokens: ["Longest reply", "in tokens", 1, 4096, 1],
  seed: ["Seed", "the same one draws the same; empty = random", 0, 2 ** 32 - 1, 1],
};

// What is asked for beyond the server's defaults.
const sampling = () => parse(local.get(SAMPLING)) || {};

function openSettings() {
  at("system").value = chat.system;
  at("sampling").replaceChildren(at("sampling").firstElementChild, ...Object.keys(FIELDS).map(field));
  if (!at("settings").open) at("settings").showModal();
}

function field(name) {
  const [title, hint, min, top, step] = FIELDS[name], limit = health.limits?.[name], max = limit?.[1] ?? limit ?? top;
  const input = make("input", { type: "number", min, max, step, placeholder: health.defaults?.[name] ?? "", "aria-label": title,
    name, oninput: () => setSampling(name, input) });
  input.value = sampling()[name] ?? "";
  return make("label", title, input, make("small", hint));
}

function setSampling(name, input) {
  const chosen = sampling();
  delete chosen[name];
  if (input.value && input.checkValidity()) chosen[name] = Number(input.value);
  local.set(SAMPLING, JSON.stringify(chosen));
}

function setSystem() {
  chat.system = at("system").value.trim();
  (chat.turns.length ? save : typed)(chat);
}

// ---- Runs: looked at again every few seconds while they are shown

const SECONDS = 3;
const ticked = new Set();   // names of the runs that are drawn
const answers = new Map();  // path: the last answer
const runLines = new Map(), runFacts = new Map();
const isRuns = () => location.hash === "#runs";
const nameOf = run => `${run.stage} ${run.tag}`;
const dayOf = seconds => new Date(1000 * seconds).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
const pair = (name, value) => make("div", make("dt", name), make("dd", value));
const short = value => Number(value.toPrecision(4)).toLocaleString(undefined, { maximumFractionDigits: 6 });
let timer = 0, drawn = [];

// An answer as JSON; the same object as before while it says the same.
async function look(path) {
  const text = await (await ask(path, { cache: "no-cache" })).text();
  if (answers.get(path)?.text !== text) answers.set(path, { text, content: parse(text) });
  return answers.get(path).content;
}

async function showRuns() {
  clearTimeout(timer);
  if (!isRuns() || document.hidden) return;
  try {
    const list = await look("runs");
    if (!ticked.size && list.runs.length) ticked.add(list.runs[0].name);
    const names = list.runs.map(run => run.name).filter(name => ticked.has(name)).slice(0, 20).map(encodeURIComponent);
    const now = [list, await look(`curves?${names.map(name => `run=${name}`).join("&")}`),
      ...await Promise.all(names.map(name => look(`runs/${name}`)))];
    const isRead = at("runs").querySelector("figure:hover");  // what is read under the pointer stays
    const isNew = now.length !== drawn.length || now.some((answer, i) => answer !== drawn[i]);
    if (isNew && !isRead) drawRuns(...(drawn = now));
  } catch (error) {
    at("runs").replaceChildren(make("p.note.error", error.message));
    drawn = [];
  }
  clearTimeout(timer);
  timer = setTimeout(showRuns, 1000 * SECONDS);
}

function drawRuns(list, { curves }, ...runs) {
  arrange(at("runlist"), list.runs.map(showRunLine));
  const problems = list.problems.map(problem => make("p.note.error", problem));
  const parts = [make("div.cards", ...runs.map(showCard)), make("div.cards", ...curves.map(showCurve)),
    ...runs.slice(0, 1).map(showSamples), ...runs.map(showFacts), report];
  const none = `No training has left a record in ${list.folder} yet. Start one, such as: bash dev/runcpu.sh`;
  arrange(at("runs"), [...problems, ...(list.runs.length ? parts : [make("p", none)])]);
}

const showRunLine = run => remade(runLines, run.name, [], () => {
  const tick = make("input", { type: "checkbox", onchange: () => {
    if (!ticked.delete(run.name)) ticked.add(run.name);
    showRuns();
  } });
  tick.checked = ticked.has(run.name);
  return { root: make("li", make("label", tick, make("b", nameOf(run)), make("small", dayOf(run.started)))) };
});

// A run in figures.
function showCard(run, i) {
  const numbers = Object.entries(run.numbers).filter(([, value]) => value !== null);
  const isLive = !run.state && Date.now() / 1000 - run.updated < 120;
  const how = isLive ? "Running" : run.state === "end" ? "Finished" : run.state || "Last heard of";
  return make("section.card", make("h2", make(`i.swatch.hue${i % 6}`), nameOf(run)),
    make(`p.muted.age${isLive ? ".live" : ""}`, `${how}, ${dayOf(run.updated)}`),
    make("progress", { max: run.num_steps || 1, value: run.step, "aria-label": "Steps done" }),
    make("p.muted", `${count(run.step)} of ${count(run.num_steps || 0)} steps`),
    make("dl.numbers", ...numbers.map(([name, value]) => pair(name, short(value)))));
}

// A diagram as the server draws it. Its legend says the values under the pointer.
function showCurve({ figure, lines, xs: [first, last], edges: [left, right, width] }) {
  const root = make("div.card"), wide = (right - left) / (last - first), rule = draw("path.rule");
  root.innerHTML = trusted(figure);
  const [picture, legend] = [root.querySelector("figure > svg"), root.querySelector("p")], usual = [...legend.childNodes];
  picture.append(rule);
  picture.addEventListener("pointermove", event => {
    const place = picture.getBoundingClientRect(), wanted = first + ((event.clientX - place.left) / place.width * width - left) / wide;
    const near = lines.map(({ points }) => points.reduce((a, b) => (Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a)));
    rule.setAttribute("d", `M${left + (near[0][0] - first) * wide} 0V999`);
    legend.replaceChildren(make("span", `at ${short(near[0][0])}`),
      ...lines.map(({ name }, i) => make("span", `${name} `, make("b", short(near[i][1])))));
  });
  picture.addEventListener("pointerleave", () => {
    rule.removeAttribute("d");
    legend.replaceChildren(...usual);
  });
  return root;
}

function showSamples(run) {
  const told = run.samples.toReversed().map(sample => make("li", make("small", `after ${sample.step} steps`),
    make("p", { dir: "auto" }, make("b", sample.prompt), " ", sample.text)));
  return make("section.card", make("h2", `Newest samples of ${nameOf(run)}`), told.length ? make("ul", ...told) : make("p.muted", "None yet."));
}

// What doesn't change about a run; the element stays, open or closed.
const showFacts = run => remade(runFacts, run.name, [], () => ({
  root: make("details", make("summary", `How ${nameOf(run)} was made`),
    make("dl", ...Object.entries(run.facts).map(([name, value]) => pair(name, String(value))))),
}));

const report = make("details", { ontoggle: showReport }, make("summary", "The report of everything in this base directory"),
  make("div.rich", "One moment …"));

async function showReport() {
  if (!report.open) return;
  try {
    const content = cleaned((await look("report")).html);
    frame(content);
    report.lastChild.replaceChildren(content);
  } catch (error) {
    report.lastChild.textContent = error.message;
  }
}

// ---- Views, keys and the start

// What the address says: a chat, a new one, or the runs.
function route() {
  const [, id] = /^#chat=(.+)$/.exec(location.hash) || [], runs = isRuns();
  for (const name of ["runs", "runs-panel"]) at(name).hidden = !runs;
  for (const name of ["chat", "chats", "foot", "options"]) at(name).hidden = runs;
  at("tab-runs").ariaCurrent = runs ? "page" : null;
  at("tab-chat").ariaCurrent = runs ? null : "page";
  main.classList.toggle("empty", !runs && !chat.turns.length);
  openSide(false);
  if (!runs) return open(id);
  showTitle();
  main.scrollTop = 0;
  showRuns();
}

function open(id) {
  if (id && !chats.has(id)) notify("That chat is not in this browser.");
  const next = chats.get(id) || (chat.turns.length ? newChat() : chat);
  if (next !== chat) views.clear();
  chat = next;
  follow = true;
  takeDraft();
  showChat();
  focusBox();
}

function startNew() {
  if (location.hash) location.hash = "";
  else open();
}

function openSide(isOpen) {
  document.body.classList.toggle("side-open", isOpen);
  at("menu").ariaExpanded = isOpen;
  at("shade").hidden = !isOpen;
  at("body").inert = isOpen;
  if (isOpen) at("shut").focus();
}

function closeSide() {
  openSide(false);
  at("menu").focus();
}

function onBoxKey(event) {
  if (event.isComposing || event.keyCode === 229) return;  // Enter then chooses a word of the input method
  const isSending = event.key === "Enter" && !event.shiftKey && (!isPhone.matches || event.ctrlKey || event.metaKey);
  if (!isSending) return;
  event.preventDefault();
  send();
}

function onKey(event) {
  if (event.key === "Escape" && !event.isComposing && !document.querySelector("dialog[open]")) {
    if (at("body").inert) closeSide();
    else if (editing !== null) endEdit();
    else stopReply();
  }
  if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    startNew();
  }
}

// The page is left, perhaps to come back from the browser's memory: what has come of replies stays.
function leave() {
  for (const [chat, { turn, controller }] of running) {
    turn.end = "cut";
    save(chat);
    controller.abort("cut");
  }
}

function unlock() {
  if (!at("token").value) return;
  session.set(TOKEN, at("token").value.trim());
  at("token").value = "";
  greet();
  route();
}

function start() {
  for (const place of document.querySelectorAll("[data-icon]")) place.replaceWith(icon(place.dataset.icon));
  takeToken();
  loadChats();
  const listen = (event, actions) =>
    Object.entries(actions).forEach(([name, action]) => at(name).addEventListener(event, action));
  listen("submit", { composer: event => { event.preventDefault(); send(); } });
  listen("click", {
    stop: () => { stopReply(); focusBox(); },
    new: event => { event.preventDefault(); startNew(); },
    unedit: () => { endEdit(); box.focus(); },
    end: () => { follow = true; followSoon(); focusBox(); },
    menu: () => openSide(true), shut: closeSide, shade: closeSide,
    export: exportAll,
    options: openSettings, reset: () => { local.remove(SAMPLING); openSettings(); },
  });
  listen("input", { search: showList, system: setSystem, box: typed });
  listen("close", { locked: unlock });
  listen("keydown", { box: onBoxKey });
  listen("scroll", { main: onScroll });
  main.addEventListener("wheel", onWheel, { passive: true });
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", showRuns);
  isPhone.addEventListener("change", showKeys);
  addEventListener("hashchange", route);
  addEventListener("storage", onStorage);
  addEventListener("pagehide", leave);
  showKeys();
  route();
  greet();
}

start();
