// SPDX-License-Identifier: Apache-2.0
// Figures as people read them.

export function count(value) {
  return value >= 10 || Number.isInteger(value) ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

export function duration(seconds) {
  if (seconds >= 100) return `${Math.round(seconds)} s`;
  if (seconds >= 1) return `${Number(seconds.toPrecision(3))} s`;
  return `${Number((1e3 * seconds).toPrecision(3))} ms`;
}

export function share(value) {
  return `${Math.round(100 * value)}%`;
}

/** A time span in minutes and seconds. */
export function age(seconds) {
  const whole = Math.floor(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} min`;
}
