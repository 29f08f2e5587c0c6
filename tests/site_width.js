// What is wider than the window: the theme hides what sticks out of the page and lets .content scroll
async () => {
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
  const most = document.documentElement.clientWidth;
  const scrolled = [document.documentElement, document.querySelector('.content')];
  const over = Math.max(...scrolled.map(e => e.scrollWidth - e.clientWidth));
  if (over < 1 && innerWidth <= 390) return [];
  const sticks_out = e => e.getBoundingClientRect().right > most + 1;
  const who = [...document.querySelectorAll('article *')]
    .filter(e => sticks_out(e) && ![...e.children].some(sticks_out));
  return [`${over} px: ` + who.slice(0, 2).map(e => e.outerHTML.slice(0, 80)).join(' | ')];
}
