// The page to chat: it speaks the API of the server that sent it, and asks nobody else.
'use strict';

const $ = (id) => document.getElementById(id);
const SETTINGS = ['temperature', 'top_p', 'max_tokens', 'seed'];
const talk = $('talk');
let model = null; // card of the model
let messages = []; // of the conversation
let running = null; // controller of the answer under way
let counts = []; // of each layer: how often each expert was chosen in this conversation

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, failed = false) {
  $('status').textContent = text;
  $('status').classList.toggle('failed', failed);
}

function headers() {
  const found = { 'Content-Type': 'application/json' };
  if ($('key').value) found.Authorization = 'Bearer ' + $('key').value;
  return found;
}

async function failure(response) {
  let text = response.status + ' ' + response.statusText;
  try { text = (await response.json()).error.message; } catch { /* no JSON: the status has to do */ }
  const after = response.headers.get('Retry-After');
  return new Error(after ? text + ' (again in ' + after + ' s)' : text);
}

async function loadModel() {
  const response = await fetch('v1/models', { headers: headers() });
  if (!response.ok) throw await failure(response);
  model = (await response.json()).data[0];
  const about = model.eva || {};
  $('model').textContent = document.title = model.id;
  $('about').textContent = (about.chat ? 'chat' : 'continues texts: the folder has no chat template') +
    (about.context ? ', ' + about.context + ' tokens of context' : '');
  $('promptLabel').textContent = about.chat ? 'Message' : 'Text to continue';
  const most = Math.max(1, Math.floor((about.context || 512) / 2));
  if (Number($('max_tokens').value) > most) $('max_tokens').value = most;
}

function settings() {
  const found = {};
  for (const name of SETTINGS) {
    const field = $(name);
    if (field.value === '') continue;
    if (!field.checkValidity()) {
      $('settings').open = true;
      field.focus();
      throw new Error(field.parentElement.textContent.trim() + ': ' + field.validationMessage);
    }
    found[name] = Number(field.value);
  }
  return found;
}

function request(text) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, eva_experts: true, ...settings() };
  if (model.eva && model.eva.chat) {
    return ['v1/chat/completions', { ...body, messages: [...messages, { role: 'user', content: text }], logprobs: true, top_logprobs: 5 }];
  }
  return ['v1/completions', { ...body, prompt: text, logprobs: 5 }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = '';
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    waiting += value;
    const parts = waiting.split('\n\n');
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, '');
      if (data === '[DONE]') return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// One form for both kinds of answers: text, log-probabilities of its tokens, details.
function readChoice(choice) {
  const text = choice.delta ? choice.delta.content || '' : choice.text || '';
  let tokens = [];
  if (choice.logprobs && choice.logprobs.content) {
    tokens = choice.logprobs.content.map((o) => ({ name: o.token, logprob: o.logprob, top: o.top_logprobs.map((t) => [t.token, t.logprob]) }));
  } else if (choice.logprobs) {
    const found = choice.logprobs;
    tokens = found.tokens.map((name, i) => ({ name, logprob: found.token_logprobs[i], top: Object.entries(found.top_logprobs[i] || {}) }));
  }
  return { text, token: tokens[0], details: choice.eva };
}

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 0.1 ? value.toFixed(1) + ' %' : '< 0.1 %';
}

function visible(name) {
  return name.replace(/ /g, '␣').replace(/\n/g, '↵').replace(/\t/g, '⇥') || '(nothing)';
}

function countExperts(experts) {
  experts.forEach((chosen, layer) => {
    counts[layer] = counts[layer] || new Map();
    for (const expert of chosen) counts[layer].set(expert, (counts[layer].get(expert) || 0) + 1);
  });
}

function showExperts(experts) {
  $('experts').hidden = !experts;
  if (!experts) return;
  const about = model.eva;
  const map = $('map');
  map.replaceChildren();
  const said = [];
  experts.forEach((chosen, layer) => {
    const number = about.moe_layers ? about.moe_layers[layer] : layer;
    const row = element('div', 'layer');
    row.append(element('span', '', 'L' + number));
    const cells = element('div', 'cells');
    cells.style.setProperty('--columns', Math.min(about.experts, 32));
    const most = Math.max(1, ...(counts[layer] ? counts[layer].values() : []));
    for (let expert = 0; expert < about.experts; expert++) {
      const cell = element('div', chosen.includes(expert) ? 'cell on' : 'cell');
      const share = ((counts[layer] && counts[layer].get(expert)) || 0) / most;
      cell.style.setProperty('--share', (0.6 * share).toFixed(2));
      cell.title = 'layer ' + number + ', expert ' + expert;
      cells.append(cell);
    }
    row.append(cells);
    map.append(row);
    said.push('layer ' + number + ': ' + [...chosen].sort((a, b) => a - b).join(', '));
  });
  map.setAttribute('aria-label', 'Experts of this token. ' + said.join('; '));
}

function showToken(span) {
  const { token, details } = span.about;
  $('hint').hidden = true;
  $('details').hidden = false;
  const drafted = details && details.drafted ? ', drafted' : '';
  $('chosen').textContent = token ? visible(token.name) + ': ' + percent(token.logprob) + drafted : 'no probability' + drafted;
  $('likely').replaceChildren();
  const rows = token ? token.top.slice() : [];
  if (token && !rows.some(([name]) => name === token.name)) rows.push([token.name, token.logprob]);
  rows.sort((a, b) => b[1] - a[1]); // an object's keys that are numbers come first, whatever their place
  for (const [name, logprob] of rows) {
    const row = element('tr', token && name === token.name ? 'chosen' : '');
    row.append(element('td', '', visible(name)), element('td', '', percent(logprob)));
    $('likely').append(row);
  }
  showExperts(details && details.experts);
}

function addToken(turn, found) {
  const span = element('span', 'token', found.text);
  span.about = found;
  if (found.token) span.style.setProperty('--doubt', (0.45 * (1 - Math.exp(found.token.logprob))).toFixed(2));
  if (found.details && found.details.drafted) span.classList.add('drafted');
  // One token of each answer is in the order of Tab; the arrow keys lead to the others.
  span.tabIndex = turn.querySelector('.token') ? -1 : 0;
  const name = found.token ? visible(found.token.name) + ', ' + percent(found.token.logprob) : found.text;
  span.setAttribute('role', 'button');
  span.setAttribute('aria-label', name + (found.details && found.details.drafted ? ', drafted' : ''));
  turn.append(span);
}

function moveFocus(event) {
  const span = event.target.closest('.token');
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!span || !step) return;
  event.preventDefault();
  const all = [...span.parentElement.querySelectorAll('.token')];
  const next = all[all.indexOf(span) + step];
  if (!next) return;
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function addTurn(who, text) {
  const turn = element('div', 'turn ' + who + (model.eva && model.eva.chat ? '' : ' plain'), text);
  turn.dataset.who = { user: 'You', assistant: model.id }[who] || who;
  talk.append(turn);
  talk.scrollTop = talk.scrollHeight;
  return turn;
}

async function receive(response, turn) {
  let text = '';
  let tokens = 0;
  let end = 'stopped';
  for await (const event of events(response)) {
    if (event.usage) tokens = event.usage.completion_tokens;
    const choice = event.choices[0];
    if (!choice) continue;
    if (choice.finish_reason) end = choice.finish_reason;
    const found = readChoice(choice);
    text += found.text;
    turn.answer = text;
    if (found.details && found.details.experts) countExperts(found.details.experts);
    if (found.text || found.token) addToken(turn, found);
    if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80) talk.scrollTop = talk.scrollHeight;
  }
  return { tokens, end };
}

async function ask(text) {
  const [path, body] = request(text);
  const chat = path.includes('chat');
  running = new AbortController();
  $('send').disabled = true;
  $('stop').disabled = false;
  addTurn('user', text);
  const turn = addTurn('assistant', '');
  const started = performance.now();
  try {
    const response = await fetch(path, { method: 'POST', headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw await failure(response);
    const { tokens, end } = await receive(response, turn);
    const seconds = (performance.now() - started) / 1000;
    say(tokens + ' tokens in ' + seconds.toFixed(1) + ' s, ended by ' + (end === 'length' ? 'the limit' : 'the model'));
  } catch (error) {
    const stopped = error.name === 'AbortError';
    say(stopped ? 'stopped' : error.message, !stopped);
    if (!stopped) {
      turn.classList.add('failed');
      if (!turn.answer) turn.append('No answer: ' + error.message);
    }
  } finally {
    if (chat && turn.answer) messages.push({ role: 'user', content: text }, { role: 'assistant', content: turn.answer });
    running = null;
    $('send').disabled = false;
    $('stop').disabled = true;
  }
}

async function submit(event) {
  if (event) event.preventDefault();
  const text = $('prompt').value;
  if (running || !text) return;
  try {
    if (!model) await loadModel();
    settings();
  } catch (error) {
    return say(error.message, true);
  }
  $('prompt').value = '';
  say('');
  await ask(text);
}

function begin() {
  if (running) running.abort();
  messages = [];
  counts = [];
  talk.replaceChildren();
  $('details').hidden = true;
  $('hint').hidden = false;
  say('');
  $('prompt').focus();
}

$('ask').addEventListener('submit', submit);
$('stop').addEventListener('click', () => running && running.abort());
$('new').addEventListener('click', begin);
$('key').addEventListener('change', () => loadModel().then(() => say(''), (error) => say(error.message, true)));
$('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && running) running.abort();
});
for (const kind of ['mouseover', 'focusin', 'click']) {
  talk.addEventListener(kind, (event) => {
    const span = event.target.closest('.token');
    if (span) showToken(span);
  });
}
talk.addEventListener('keydown', moveFocus);
loadModel().catch((error) => say(error.message, true));
